"""What a training run is: one frozen dataclass, read from TOML or JSON.

Every field has a default but the start (`checkpoint` or `model`); a file names what differs.
"""

import dataclasses
import difflib
import functools
import json
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sam3_jax.config import Config
from sam3_jax.training.dense_pretraining import DenseConfig
from sam3_jax.training.examples import DataConfig
from sam3_jax.training.lora import LoraConfig
from sam3_jax.training.losses import LossConfig
from sam3_jax.training.optimizer import OptimizerConfig
from sam3_jax.training.sources import SceneConfig
from sam3_jax.training.visual import TRAINED, VisualConfig
from sam3_jax.utils.json_text import parse
from sam3_jax.utils.validation import check_numbers, check_pattern

OBJECTIVES = ("detection", "dense", "visual")
DTYPES = ("auto", "float32", "bfloat16")
REMAT = ("none", "full")
VISUAL_BEST = ("click", "click_best", "three_clicks", "box")
BEST = ("il_mcc", *(f"{name}{at}" for name in ("cgf1", "pmf1", "f1") for at in ("", "_50", "_75")))
NOTHING = r"(?!)"
LORA, OPTIMIZER, DATA = LoraConfig(), OptimizerConfig(), DataConfig()
LOSSES, DENSE, VISUAL = LossConfig(), DenseConfig(), VisualConfig()
FINE_TUNED = r"(?!trunk/|text/).*"  # all but the two large encoders


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """A training run.

  Attributes:
    checkpoint: folder or name of the checkpoint to start from; empty for random parameters of
      `model`.
    model: sizes of a random start; None with a checkpoint.
    image_size, window: of a checkpoint's model, in pixels and patches a side: it sees its images
      at this resolution from now on, its parameters fit all; 0 for as it was.
    tokenizer: of a random start: a SentencePiece file, or the checkpoint that has the vocabulary; a
      model of fewer words takes the first merges.
    name: what the new checkpoint calls itself; empty for the output folder's name.
    licence: of the new weights; empty for the starting checkpoint's.
    annotations: file of the training pairs, SA-Co's or COCO's layout.
    images: folder that their file names are relative to; empty for the annotations' own.
    scenes: scenes composed on the fly, in place of annotations.
    evaluation_annotations, evaluation_images: the same of what is scored while training; no
      annotations for nothing.
    objective: "detection"; or "dense", the pretraining in `dense` of all but the geometry encoder
      and the decoder, of which only the box head and the norm before it learn; or "visual", the
      head for visual prompts in `visual`, beside a model that stays as it is, bit for bit. One that
      has no such head gets a random one, its neck begun from the concepts'.
    train: pattern of the whole paths of the parameters to train. Empty: all of a random start; of a
      checkpoint all but trunk and text; only the low-rank factors if there are any; all of its head
      with the objective visual.
    lora: low-rank adaptation; its factors are trained beside what `train` names.
    mask_size: cells a side of the target masks; 0 for the model's own masks.
    steps: of the whole run; the schedule ends there.
    accumulate: microbatches a step, into which `data.batch` is cut.
    average: decay of the parameters' exponential moving average (EMA), which is what is evaluated
      and written; 0 for none.
    duplicate: train one-to-many queries (DAC) beside the model's own.
    masked: masks are trained for the first so many prompts of an image; 0 for all with objects.
      Of detection only, as are the `losses`; `dense` and `visual` have the weights of the others.
    dtype: of the computation; auto is float32 on a CPU, else bfloat16. Parameters are float32.
    remat: "full" computes each layer again in the backward pass (rematerialisation, gradient
      checkpointing): less memory, and faster for it (benchmarks/train.py); "none" keeps everything.
    fsdp: devices that share one copy of the parameters; the others are data parallel.
    seed: of random parameters and dropout; the data has its own.
    save_every: steps between checkpoints to resume from; 0 for none but the last.
    keep: how many of those are kept.
    evaluate_every: steps between evaluations; 0 for none but the last.
    evaluate_pairs: the first so many pairs are scored; 0 for all.
    best: the figure of the evaluation by which the best checkpoint is kept; of the objective visual
      one of evaluation.clicks, three_clicks if not given.
    stored: dtype of the parameters in the bundles that are written.
  """

  checkpoint: str = ""
  model: Config | None = None
  image_size: int = 0
  window: int = 0
  tokenizer: str = "sam3-tiny"
  name: str = ""
  licence: str = ""
  annotations: str = ""
  images: str = ""
  scenes: SceneConfig | None = None
  evaluation_annotations: str = ""
  evaluation_images: str = ""
  objective: str = "detection"
  train: str = ""
  lora: LoraConfig = LORA
  optimizer: OptimizerConfig = OPTIMIZER
  losses: LossConfig = LOSSES
  dense: DenseConfig = DENSE
  visual: VisualConfig = VISUAL
  data: DataConfig = DATA
  mask_size: int = 0
  steps: int = 1000
  accumulate: int = 1
  average: float = 0.0
  duplicate: bool = True
  masked: int = 0
  dtype: str = "auto"
  remat: str = "full"
  fsdp: int = 1
  seed: int = 0
  save_every: int = 200
  keep: int = 2
  evaluate_every: int = 0
  evaluate_pairs: int = 0
  best: str = ""
  stored: str = "float32"

  def __post_init__(self):
    if bool(self.checkpoint) == (self.model is not None):
      raise ValueError(
        "give either checkpoint (--checkpoint sam3-tiny), to start from its parameters, or model "
        "(in CONFIG), to start from random ones."
      )
    if self.model is not None and (self.image_size or self.window):
      raise ValueError("image_size and window belong into model, if there is one.")
    if not self.best:
      usual = "three_clicks" if self.objective == "visual" else "cgf1"
      object.__setattr__(self, "best", usual)
    check = functools.partial(check_numbers, self, "")
    check(("steps", "accumulate", "fsdp", "keep"), 1)
    check(("save_every", "seed", "evaluate_every", "evaluate_pairs"), 0)
    check(("mask_size", "masked", "image_size", "window"), 0)
    check(("average",), 0, 1, "[)")
    for field, known in (
      ("objective", OBJECTIVES),
      ("dtype", DTYPES),
      ("stored", DTYPES[1:]),
      ("remat", REMAT),
      ("best", VISUAL_BEST if self.objective == "visual" else BEST),
    ):
      if getattr(self, field) not in known:
        raise ValueError(
          f"{field} must be one of {', '.join(known)}; got {getattr(self, field)!r}."
        )
    if self.data.batch % self.accumulate:
      raise ValueError(
        f"a batch of {self.data.batch} images cannot be cut into {self.accumulate} microbatches; "
        "change data.batch or accumulate."
      )
    if self.objective != "detection" and (self.masked or self.losses != LOSSES):
      raise ValueError(
        f"masked and losses belong to the objective detection; {self.objective} has weights of its "
        f"own, {self.objective}."
      )
    for objective, usual in (("dense", DENSE), ("visual", VISUAL)):
      if self.objective != objective and getattr(self, objective) != usual:
        raise ValueError(
          f"{objective} has the weights of the objective {objective}, but the objective is "
          f"{self.objective}."
        )
    if self.objective == "visual" and (self.model is not None or self.lora.rank):
      raise ValueError(
        "the objective visual trains a head beside a checkpoint's model: give checkpoint "
        "(--checkpoint sam3-tiny), and leave model and lora out."
      )
    check_pattern(self.train, "train")

  @property
  def trained(self) -> str:
    """The pattern of the parameters to train, `train` or its default."""
    if self.train:
      return self.train
    if self.objective == "visual":
      return TRAINED
    if self.lora.rank:
      return NOTHING
    return FINE_TUNED if self.checkpoint else ".*"

  def to_dict(self) -> dict[str, Any]:
    """Nested plain values, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(self)))

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
    """From nested plain values; what they leave out has its default.

    Raises:
      ValueError: an unknown field, or a value of the wrong type or range.
    """
    return _build(cls, values, "")


def read(path: str | Path) -> dict[str, Any]:
  """The values of a TOML or JSON file, for `from_dict`.

  Raises:
    FileNotFoundError: no such file.
    ValueError: it is neither, or no table.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"there is no configuration {path}; check the spelling and the folder.")
  try:
    text = path.read_text(encoding="utf-8")
    values = tomllib.loads(text) if path.suffix == ".toml" else parse(text, "it")
  except ValueError as error:  # of TOML, JSON and UTF-8
    raise ValueError(
      f"{path} is not readable {path.suffix.lstrip('.') or 'JSON'}: {error}."
    ) from error
  if not isinstance(values, dict):
    raise ValueError(f"{path} must hold one object with fields such as steps; got {values!r:.40}.")
  return values


def overlaid(values: Mapping[str, Any], typed: Mapping[str, Any]) -> dict[str, Any]:
  """The values with those in `typed` that are not None in their place, paths as text; `a.b` names a
  field of a field."""
  result = dict(values)
  for name, value in typed.items():
    if value is None:
      continue
    table, _, field = name.rpartition(".")
    value = str(value) if isinstance(value, Path) else value
    if not table:
      result[field] = value
      continue
    inner = result.get(table, {})
    result[table] = {**inner, field: value} if isinstance(inner, Mapping) else inner
  return result


def completed(values: Any) -> Any:
  """Values that an earlier version wrote, with the defaults of fields that it had not: what it did
  without them. As they are, if they are no configuration of this version."""
  try:
    return TrainConfig.from_dict(values).to_dict()
  except ValueError:
    return values


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
  """Names of the fields whose values differ, `a.b` of nested ones."""
  found = []
  for name in [*old, *(name for name in new if name not in old)]:
    before, after = old.get(name), new.get(name)
    if isinstance(before, Mapping) and isinstance(after, Mapping):
      found += differences(before, after, f"{prefix}{name}.")
    elif before != after:
      found.append(prefix + name)
  return found


def _build(cls: type, values: Any, where: str) -> Any:
  if not isinstance(values, Mapping):
    raise ValueError(f"{where} must be a table with the fields of {cls.__name__}; got {values!r}.")
  known = typing.get_type_hints(cls)
  where = f"{where}." if where else ""
  for name in values:
    if name not in known:
      close = difflib.get_close_matches(name, known, n=1)
      hint = f"did you mean {close[0]}?" if close else f"{cls.__name__} has {', '.join(known)}."
      raise ValueError(f"{where}{name} is no field of a training configuration; {hint}")
  try:
    return cls(**{name: _typed(value, known[name], where + name) for name, value in values.items()})
  except TypeError as error:  # a field without a default is missing
    raise ValueError(f"{where.rstrip('.')}: {error}.") from error


def _knows(cls: Any, value: Any) -> bool:
  """Whether a table has no fields but those of a class."""
  table = isinstance(value, Mapping) and dataclasses.is_dataclass(cls)
  return table and value.keys() <= typing.get_type_hints(cls).keys()


def _typed(value: Any, expected: Any, where: str) -> Any:
  if dataclasses.is_dataclass(expected):
    return _build(typing.cast(type, expected), value, where)
  if isinstance(expected, types.UnionType):  # X | None, or tables told apart by their fields
    inner = [one for one in typing.get_args(expected) if one is not types.NoneType]
    if value is None and len(inner) == 1:
      return None
    return _typed(value, next((one for one in inner if _knows(one, value)), inner[0]), where)
  if typing.get_origin(expected) is tuple:
    value = list(value.items()) if isinstance(value, Mapping) else value  # pairs as a table
    of = typing.get_args(expected)
    if not isinstance(value, list | tuple):
      raise ValueError(f"{where} must be a list; got {value!r}.")
    of = of[:1] * len(value) if of[-1] is ... else of
    if len(of) != len(value):
      raise ValueError(f"{where} must have {len(of)} values; got {value!r}.")
    return tuple(
      _typed(v, one, f"{where}[{i}]") for i, (v, one) in enumerate(zip(value, of, strict=True))
    )
  if type(value) is expected or (expected is float and type(value) is int):
    return expected(value)
  raise ValueError(f"{where} must be of type {expected.__name__}; got {value!r}.")
