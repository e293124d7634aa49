"""The configuration of a training run: one frozen dataclass, with a nested one for each part.

Every field has a default, but a run needs a start: `checkpoint` or `model`.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

from sam3_jax.config import Config, VideoConfig
from sam3_jax.training import tracking, visual
from sam3_jax.training.dense_pretraining import DenseConfig
from sam3_jax.training.examples import DataConfig
from sam3_jax.training.lora import LoraConfig
from sam3_jax.training.losses import LossConfig
from sam3_jax.training.optimizer import OptimizerConfig
from sam3_jax.training.renamed_fields import check_renamed
from sam3_jax.training.sources import SceneConfig
from sam3_jax.training.tracking import TrackingConfig
from sam3_jax.training.video_examples import ClipConfig
from sam3_jax.training.visual import VisualConfig
from sam3_jax.utils.dataclass_dict import from_dict
from sam3_jax.utils.validation import check_numbers, check_pattern

OBJECTIVES = ("detection", "dense", "visual", "video")
DTYPES = ("auto", "float32", "bfloat16")
REMAT = ("none", "full")
VISUAL_METRICS = ("click", "click_best", "three_clicks", "box")
VIDEO_METRICS = ("jf_mask", "jf_click_1")  # J&F after a mask or a click on the first frame
METRICS = (
  "il_mcc",
  *(f"{name}{iou}" for name in ("cgf1", "pmf1", "f1") for iou in ("", "_50", "_75")),
)
NO_PARAMETER = r"(?!)"
DETECTOR = r"(?!trunk/|text/).*"  # all parameters but those of the two large encoders
LORA, OPTIMIZER, DATA = LoraConfig(), OptimizerConfig(), DataConfig()
LOSSES, DENSE, VISUAL, VIDEO = LossConfig(), DenseConfig(), VisualConfig(), TrackingConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """A training run. A comment above each field documents it; see `utils.field_docs`."""

  # Directory or name of the checkpoint to start from; empty to start from random parameters of
  # `model`.
  checkpoint: str = ""
  # Sizes of a model with random parameters; give either this or `checkpoint`.
  model: Config | None = None
  # Pixels per side of the model's input square; 0 for the size of the checkpoint. The parameters do
  # not depend on it.
  image_size: int = 0
  # Patches per side of the trunk's attention windows; 0 for the windows of the checkpoint.
  window: int = 0
  # Tokenizer of a model that starts from random parameters: a SentencePiece file, or a checkpoint
  # that has one. A model with a smaller vocabulary uses the first merges.
  tokenizer: str = "sam3-tiny"
  # Name of the new checkpoint; empty for the name of the output directory.
  name: str = ""
  # Licence of the new weights; empty for the licence of the starting checkpoint.
  licence: str = ""
  # Annotation file of the training data, in the layout of SA-Co or COCO.
  annotations: str = ""
  # Directory that file names in `annotations` are relative to; empty for the directory of
  # `annotations`.
  images: str = ""
  # Scenes composed on the fly, instead of `annotations`.
  scenes: SceneConfig | None = None
  # Annotation file of the evaluation data; empty for no evaluation.
  evaluation_annotations: str = ""
  # Directory of the evaluation images; empty for the directory of `evaluation_annotations`.
  evaluation_images: str = ""
  # "detection"; "dense" pretrains everything but the geometry encoder and the decoder's layers (see
  # `dense`); "visual" trains the head for visual prompts (see `visual`) and leaves the rest of the
  # model unchanged, bit for bit. A checkpoint without that head gets a new one. "video" trains the
  # tracker on `clips` (see `video`), in the same way.
  objective: str = "detection"
  # Regular expression for the full paths of the trainable parameters. If empty: all parameters of
  # a model that starts from random parameters; all but `trunk` and `text` of a checkpoint; with
  # `lora`, only the low-rank factors; with objective "visual", the head for visual prompts; with
  # objective "video", the tracker.
  trainable: str = ""
  # Low-rank adaptation; its factors are trained in addition to `trainable`.
  lora: LoraConfig = LORA
  # Optimizer and learning rate schedule.
  optimizer: OptimizerConfig = OPTIMIZER
  # Losses of objective "detection".
  losses: LossConfig = LOSSES
  # Losses and sampling of objective "dense".
  dense: DenseConfig = DENSE
  # Prompts and losses of objective "visual".
  visual: VisualConfig = VISUAL
  # Losses of objective "video".
  video: TrackingConfig = VIDEO
  # Clips of moving scenes, composed on the fly, for objective "video".
  clips: ClipConfig | None = None
  # Sizes of the tracker of a checkpoint that has none, for objective "video".
  tracker: VideoConfig | None = None
  # Batches and augmentation.
  data: DataConfig = DATA
  # Cells per side of the target masks; 0 for the model's mask size.
  mask_size: int = 0
  # Optimizer steps of the whole run; the learning rate schedule ends with them.
  steps: int = 1000
  # Microbatches per step: `data.batch_size` is divided into this many.
  gradient_accumulation_steps: int = 1
  # Decay of the exponential moving average (EMA) of the parameters, in [0, 1). The average is
  # evaluated and saved. 0 for no average.
  ema_decay: float = 0.0
  # Train one-to-many queries in addition to the model's own (DAC).
  one_to_many: bool = True
  # Number of prompts per image, counted from the first, for which masks are trained; 0 for all
  # prompts with objects. Only for objective "detection".
  mask_prompts: int = 0
  # Type of the computation: "float32", "bfloat16", or "auto" for float32 on a CPU and bfloat16
  # elsewhere. Parameters are always float32.
  dtype: str = "auto"
  # "full" recomputes the layers' activations in the backward pass (gradient checkpointing), which
  # takes less memory and is faster (benchmarks/train.py); "none" keeps them.
  remat: str = "full"
  # Devices that share one copy of the parameters (fully sharded data parallelism); the groups of
  # devices are data parallel.
  fsdp: int = 1
  # Seed of random parameters and dropout; `data.seed` is separate.
  seed: int = 0
  # Steps between checkpoints to resume from; 0 for one at the end only.
  save_every: int = 200
  # Number of checkpoints to keep for resuming; the latest ones are kept.
  max_to_keep: int = 2
  # Steps between evaluations; 0 for one at the end only.
  evaluate_every: int = 0
  # Number of image-phrase pairs to evaluate, counted from the first; 0 for all.
  evaluate_pairs: int = 0
  # Evaluation metric that selects the best checkpoint; empty for "cgf1", for "three_clicks" with
  # objective "visual", or for "jf_mask" with objective "video".
  best_metric: str = ""
  # Type of the parameters in saved checkpoints: "float32" or "bfloat16".
  save_dtype: str = "float32"

  def __post_init__(self):
    if not self.best_metric:
      metric = {"visual": "three_clicks", "video": "jf_mask"}.get(self.objective, "cgf1")
      object.__setattr__(self, "best_metric", metric)
    check = functools.partial(check_numbers, self, "")
    check(("steps", "gradient_accumulation_steps", "fsdp", "max_to_keep"), 1)
    check(("save_every", "seed", "evaluate_every", "evaluate_pairs"), 0)
    check(("mask_size", "mask_prompts", "image_size", "window"), 0)
    check(("ema_decay",), 0, 1, "[)")
    for field, known in (
      ("objective", OBJECTIVES),
      ("dtype", DTYPES),
      ("save_dtype", DTYPES[1:]),
      ("remat", REMAT),
      (
        "best_metric",
        {"visual": VISUAL_METRICS, "video": VIDEO_METRICS}.get(self.objective, METRICS),
      ),
    ):
      if getattr(self, field) not in known:
        raise ValueError(
          f"{field} must be one of {', '.join(known)}; got {getattr(self, field)!r}."
        )
    if self.batch_size % self.gradient_accumulation_steps:
      table = "clips" if self.clips else "data"
      raise ValueError(
        f"{table}.batch_size {self.batch_size} cannot be divided into "
        f"{self.gradient_accumulation_steps} microbatches; change {table}.batch_size or "
        "gradient_accumulation_steps."
      )
    check_pattern(self.trainable, "trainable")
    self._check_start()
    self._check_objective()

  def _check_start(self) -> None:
    if bool(self.checkpoint) == (self.model is not None):
      raise ValueError(
        "give either checkpoint (--checkpoint sam3-tiny), to start from its parameters, or model "
        "(in CONFIG), to start from random parameters."
      )
    if self.model is not None and (self.image_size or self.window):
      raise ValueError("set image_size and window in model: there is no checkpoint to change.")

  def _check_objective(self) -> None:
    """Refuses settings that the objective does not use."""
    if self.objective != "detection" and (self.mask_prompts or self.losses != LOSSES):
      raise ValueError(
        f"mask_prompts and losses are for the objective detection; the objective {self.objective} "
        f"has its own weights, in {self.objective}."
      )
    for objective, default in (("dense", DENSE), ("visual", VISUAL), ("video", VIDEO)):
      if self.objective != objective and getattr(self, objective) != default:
        raise ValueError(
          f"{objective} is for the objective {objective}, but the objective is {self.objective}."
        )
    part = {"visual": "a head", "video": "a tracker"}.get(self.objective)
    if part and (self.model is not None or self.lora.rank):
      raise ValueError(
        f"the objective {self.objective} trains {part} on top of a checkpoint's model: give "
        "checkpoint (--checkpoint sam3-tiny), and remove model and lora."
      )
    if (self.objective == "video") != (self.clips is not None):
      raise ValueError("clips are for the objective video, which needs them: set both, or neither.")
    if self.tracker is not None and self.objective != "video":
      raise ValueError(f"tracker is for the objective video; the objective is {self.objective}.")
    if self.clips is not None and (self.annotations or self.scenes is not None):
      raise ValueError("the objective video trains on clips: remove annotations and scenes.")

  @property
  def batch_size(self) -> int:
    """Images or clips per step."""
    return (self.clips or self.data).batch_size

  @property
  def trainable_pattern(self) -> str:
    """`trainable`, or its default for this run."""
    if self.trainable:
      return self.trainable
    if self.objective in ("visual", "video"):
      return {"visual": visual, "video": tracking}[self.objective].TRAINABLE
    if self.lora.rank:
      return NO_PARAMETER
    return DETECTOR if self.checkpoint else ".*"

  def to_dict(self) -> dict[str, Any]:
    """Nested plain values, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(self)))

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
    """Builds a configuration from nested plain values; missing fields get their defaults.

    Raises:
      ValueError: an unknown field, a field name of format version 1, or a value of the wrong type
        or out of range.
    """
    check_renamed(values)
    return from_dict(cls, values, what="a training configuration")
