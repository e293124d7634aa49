"""Checkpoints by name, and the call of KerasHub's model card of `sam3_pcs` as it is printed there.

`keras_hub.models` replaced by `sam3_jax` is all a user of the card has to change.
"""

import contextlib
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import numpy as np
from jaxtyping import Float

from sam3_jax.checkpoint import hf_hub
from sam3_jax.checkpoint.writer import FORMAT_VERSION
from sam3_jax.inference.predictor import Sam3
from sam3_jax.inputs.prompts import Prompt
from sam3_jax.utils.atomic_files import write_json
from sam3_jax.utils.identity import digest, identify
from sam3_jax.utils.json_text import parse
from sam3_jax.utils.lease import Lease
from sam3_jax.utils.os_errors import error_text
from sam3_jax.utils.paths import exists, file_sizes, resolve_path, scheme_of, user_cache
from sam3_jax.utils.validation import as_array

CONVERSION = 1  # raised when `convert` makes another bundle of the same source: it is made again
WAIT = 0.5  # seconds between two looks whether another process has converted an entry
Note = Callable[[str], None]  # is told a line that the user should see
PADDING_LABEL = -10  # KerasHub's and transformers' label of a box that is not there


def find_checkpoint(
  name: str | Path,
  *,
  progress: Callable[[str, float], None] | None = None,
  note: Note = warnings.warn,
) -> Path:
  """The folder of the checkpoint called `name`.

  Looks for: a folder of this path, or one in a bucket, `gs://bucket/path` (needs the extra `gcs`);
  `$SAM3_JAX_CHECKPOINTS/name`; `./checkpoints/name`; the packaged `sam3_tiny`; `hf://org/name` or
  `hf://org/name@revision` on the Hugging Face hub (needs the extra `hub`; raises as
  `snapshots.download` does). Underscores and hyphens of a name are the same.

  What comes from the hub is converted once for each commit, into the cache, while other processes
  wait. The hub is asked each time which commit a branch or tag is; without a connection the last
  one is used, with a note. `@commit` never asks. `progress` is told as by `converters.convert`,
  `note` of waiting, and of the commit that is used without a connection.

  Raises:
    FileNotFoundError: none of these; the message lists them and says how to convert.
    ValueError: an empty name.
  """
  if str(name).startswith(hf_hub.SCHEME):
    return _from_hub(str(name), progress, note)
  if scheme_of(name):
    return _in_bucket(resolve_path(name))
  if not str(name):
    raise ValueError("the checkpoint's name is empty; give a folder or a name, such as sam3_tiny.")
  shelves = [Path("checkpoints"), *_packaged()]
  if shelf := os.environ.get("SAM3_JAX_CHECKPOINTS"):
    shelves.insert(0, Path(shelf))
  spellings = dict.fromkeys((str(name), str(name).replace("_", "-")))
  folders = [Path(name), *(shelf / one for shelf in shelves for one in spellings)]
  for folder in folders:
    if folder.is_dir():
      return folder
  if Path(name).is_file():
    raise ValueError(
      f"{name} is a file, but a checkpoint is a folder; if it holds released weights, convert it: "
      f"`sam3-jax convert {name} OUT`."
    )
  looked = ", ".join(map(str, dict.fromkeys(folders)))
  raise FileNotFoundError(
    f"no checkpoint {str(name)!r}; looked in {looked}. Convert the released weights with "
    f"`sam3-jax convert SOURCE checkpoints/{Path(name).name}`, or use sam3_tiny."
  )


class SAM3PromptableConceptImageSegmenter:
  """Promptable concept segmentation with the inputs and outputs of KerasHub's class of this name.

  The numbers are those of Meta's released code, from which KerasHub's differ.
  """

  def __init__(self, model: Sam3):
    self.model = model

  @classmethod
  def from_preset(cls, preset: str, *, dtype: str | None = None, device: Any = None) -> Self:
    """Loads the checkpoint that `find_checkpoint` finds; `dtype` and `device` as in
    `Sam3.from_checkpoint`."""
    return cls(Sam3.from_checkpoint(find_checkpoint(preset), dtype=dtype, device=device))

  def predict(self, inputs: Mapping[str, Any]) -> dict[str, Float[np.ndarray, "B ..."]]:
    """Segments one prompt in each image.

    Args:
      inputs: a mapping with
        images: [B, h, w, 3], or one image [h, w, 3]; values 0..255 (floats are rounded);
        prompts: a phrase an image; may be left out when there are boxes;
        boxes: [B, N, 4] x0, y0, x1, y1 in pixels; may be left out when there are prompts;
        box_labels: [B, N], 1 for an example, 0 for a counterexample, -10 for padding; may be left
          out: all 1.

    Returns:
      scores [B, Q]; boxes [B, Q, 4], x0, y0, x1, y1 as fractions of width and height; masks
      [B, Q, Hm, Wm], probabilities on the decoder's grid. One image counts as B = 1.

    Raises:
      ValueError: values outside 0..255, unequal numbers of images and prompts, neither prompts nor
        boxes, an unknown key.
    """
    if not isinstance(inputs, Mapping):
      raise TypeError(f"predict takes a mapping with images and prompts; got {type(inputs)}.")
    if unknown := inputs.keys() - {"images", "prompts", "boxes", "box_labels"}:
      raise ValueError(
        f"unknown inputs {sorted(unknown)}; there are images, prompts, boxes and box_labels."
      )
    if inputs.get("images") is None:
      raise ValueError("inputs need images: an array [B, h, w, 3] with values 0..255.")
    images = _images(inputs["images"])
    prompts = _prompts(inputs, len(images))
    embedding = self.model.encode(list(images))
    found = self.model.decode(embedding, prompts, range(len(images)))
    logits = np.asarray(found.mask_logits, np.float32)
    return {
      "scores": np.asarray(found.scores),
      "boxes": np.asarray(found.boxes),
      "masks": 0.5 * (1 + np.tanh(0.5 * logits)),  # the sigmoid, without overflow
    }


def _images(images: Any) -> np.ndarray:
  images = as_array(images)
  if images.ndim == 3:
    images = images[None]
  if images.ndim != 4 or images.shape[-1] != 3:
    raise ValueError(f"images must be [B, h, w, 3] or [h, w, 3]; got shape {images.shape}.")
  if not np.all((images >= 0) & (images <= 255)):  # NaN fails too
    raise ValueError(
      f"images must have values 0..255; got {np.min(images)} to {np.max(images)}. "
      "Scale them first: no scale is guessed."
    )
  for i, image in enumerate(images):
    if image.dtype.kind == "f" and image.max(initial=0) <= 1 and (image % 1).any():
      raise ValueError(
        f"image {i} has values from {image.min():.4g} to {image.max():.4g}, all but black on the "
        "scale 0..255: multiply by 255 if they are on the scale 0..1."
      )
  return np.rint(images).astype(np.uint8)


def _prompts(inputs: Mapping[str, Any], count: int) -> list[Prompt]:
  """One prompt an image, of the phrases and the boxes that are not padding."""
  texts, boxes, labels = (inputs.get(key) for key in ("prompts", "boxes", "box_labels"))
  texts = [texts] if isinstance(texts, str) else [None] * count if texts is None else list(texts)
  boxes = np.zeros((count, 0, 4)) if boxes is None else np.asarray(boxes, np.float64)
  boxes = boxes[None] if boxes.ndim == 2 else boxes
  labels = np.ones(boxes.shape[:-1]) if labels is None else np.asarray(labels)
  labels = labels[None] if labels.ndim == 1 else labels
  if boxes.ndim != 3 or boxes.shape[-1] != 4 or labels.shape != boxes.shape[:2]:
    raise ValueError(
      f"boxes must be [B, N, 4] and box_labels [B, N]; got {boxes.shape} and {labels.shape}."
    )
  if not count == len(texts) == len(boxes):
    raise ValueError(
      f"{count} images need as many prompts and rows of boxes; got {len(texts)} and {len(boxes)}."
    )
  there = labels != PADDING_LABEL
  return [
    Prompt(text, box[use], label[use])
    for text, box, label, use in zip(texts, boxes, labels, there, strict=True)
  ]


def _in_bucket(path: Path) -> Path:
  if not exists(path):
    raise FileNotFoundError(
      f"there is no checkpoint at {path}; `sam3-jax convert` makes one there."
    )
  return path


def _packaged() -> list[Path]:
  """Where the embedded checkpoint lies: in the package, or beside it in a clone."""
  package = Path(__file__).parents[1]
  clone = package.parent
  beside = [clone / "checkpoints"] if (clone / "pyproject.toml").is_file() else []
  return [package / "checkpoints", *beside]


def _from_hub(name: str, progress: Callable[[str, float], None] | None, note: Note) -> Path:
  """The bundle of what a name stands for on the hub now, in the cache.

  An entry is keyed by the commit and by the version of the conversion, so it is never that of
  another revision. Its config.json has the repository and the checksums of the converted files.
  """
  repository, revision = hf_hub.check_name(name)
  try:
    cache = user_cache()
  except RuntimeError as error:
    raise ValueError(f"there is no home to keep {name} in; set XDG_CACHE_HOME.") from error
  folder = cache / "hub" / repository.replace("/", "--")
  ref = folder / f"{quote(revision or 'main', safe='')}.json"
  commit, reason = hf_hub.resolve(repository, revision)
  if commit is None and (known := _last_known(ref)) and _entry(folder, known).is_dir():
    note(f"the hub does not say what {name} is now ({reason}); commit {known:.12} is used.")
    return _entry(folder, known)
  if commit and _entry(folder, commit).is_dir():
    with contextlib.suppress(OSError):  # of a cache that cannot be written
      _remember(ref, commit)
    return _entry(folder, commit)
  with _turn(folder / f"{commit or ref.stem}.lease", name, progress, note):
    if commit and _entry(folder, commit).is_dir():  # the process that was waited for made it
      target = _entry(folder, commit)
    else:
      target, commit = _convert(folder, repository, commit, name, progress)
      old = [*repository.split("/"), *(revision or "").replace("/", "-").split()]
      _explain_old(cache / "--".join(old), note)
    _remember(ref, commit)
  return target


def _convert(
  folder: Path,
  repository: str,
  commit: str | None,
  name: str,
  progress: Callable[[str, float], None] | None,
) -> tuple[Path, str]:
  """Downloads and converts a commit, or the one that the client has; its entry and itself."""
  # setuptools maps the folder converters/ to this name, which pyright cannot know.
  from sam3_jax.converters import convert  # pyright: ignore[reportMissingImports]

  if progress:
    progress(f"downloading {name}", 0.0)
  source = hf_hub.download(f"{hf_hub.SCHEME}{repository}@{commit}" if commit else name)
  commit = commit or hf_hub.commit_of(source) or _digest(source)
  target = _entry(folder, commit)
  if not target.is_dir():
    convert(source, target, progress=progress)
  return target, commit


@contextlib.contextmanager
def _turn(
  path: Path, name: str, progress: Callable[[str, float], None] | None, note: Note
) -> Iterator[None]:
  """Holds the lease on an entry; waits for a process that converts it already."""
  lease, told = Lease(path), False
  try:
    while not lease.acquire():
      line = f"waiting for {lease.holder() or 'another process'}, which converts {name}"
      if not told:
        note(f"{line}.")
      told = True
      if progress:
        progress(line, 0.0)
      time.sleep(WAIT)
  except OSError as error:
    raise ValueError(
      f"cannot write to {path.parent}: {error_text(error)}; set XDG_CACHE_HOME to a folder that "
      "can be written."
    ) from error
  with lease:
    yield


def _entry(folder: Path, commit: str) -> Path:
  return folder / f"{commit}-{FORMAT_VERSION}.{CONVERSION}"


def _last_known(ref: Path) -> str | None:
  """The commit that a revision stood for when the hub was last asked."""
  try:
    values = parse(ref.read_bytes(), "it")
  except (OSError, ValueError):
    return None
  commit = values.get("commit") if isinstance(values, dict) else None
  return commit if isinstance(commit, str) and re.fullmatch(r"[0-9a-f]{40}", commit) else None


def _remember(ref: Path, commit: str) -> None:
  if _last_known(ref) != commit:
    write_json(ref, {"commit": commit})


def _digest(folder: Path) -> str:
  """In place of a commit, of a folder that is none of the client's: of its files' identities."""
  names = file_sizes(folder)
  found = {name: identify(folder / name) for name in names}
  return digest({name: [one.size, one.modified] for name, one in found.items() if one})[:40]


def _explain_old(path: Path, note: Note) -> None:
  if (path / "manifest.json").is_file():
    note(
      f"{path} was made by an earlier version, of a commit that it does not name; it is not used "
      "any more and may be removed."
    )
