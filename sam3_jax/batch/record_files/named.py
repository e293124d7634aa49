"""Finds the files of datasets given by name, as TFDS and Hugging Face datasets prepared them.

Only what is on the disk is used: nothing is downloaded, and neither package has to be installed.
Both describe the files of a dataset in JSON:

- TFDS: DATA_DIR/NAME/CONFIG/VERSION/ has dataset_info.json, features.json and the shards.
- Cache of Hugging Face datasets: CACHE/ORG___NAME/CONFIG/VERSION/HASH/ has dataset_info.json and
  Arrow files.
- `save_to_disk` of Hugging Face datasets: a directory with state.json, or one with
  dataset_dict.json and such a directory for each split.
"""

import dataclasses
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sam3_jax.batch.record_files.columns import Columns
from sam3_jax.utils.json_text import parse, shown
from sam3_jax.utils.os_errors import error_text

TFDS, HUGGING_FACE = "tfds://", "datasets://"
_TFDS_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
_TFDS_FORMATS = ("array_record", "tfrecord")
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")


class DatasetFile(NamedTuple):
  """A file of a dataset.

  Attributes:
    path: of the file.
    format: of the file, as `listing.record_format` returns it.
    rows: number of records that it must have; None if unknown.
  """

  path: Path
  format: str
  rows: int | None


def is_dataset(images: str) -> bool:
  """Whether a value of --images names a dataset."""
  return images.startswith((TFDS, HUGGING_FACE))


def find_dataset(images: str, columns: Columns) -> tuple[list[DatasetFile], Columns]:
  """The files of a dataset in order, and the columns, with that of images if it is described.

  Args:
    images: `tfds://NAME[/CONFIG][:VERSION]` or `datasets://[ORG/]NAME[:CONFIG]`; or either prefix
      and a directory that begins with `/`, `.` or `~`.
    columns: as given by the user.

  Raises:
    FileNotFoundError: the dataset is not on the disk; says how to prepare it.
    ValueError: it has several configurations or splits and none is chosen, it has no images, or its
      description is damaged.
  """
  find = _tfds if images.startswith(TFDS) else _hugging_face
  try:
    return find(images, columns)
  except (KeyError, TypeError, AttributeError) as error:  # JSON of another structure
    raise ValueError(f"{images}: its description is damaged ({error}); prepare it again.") from None


def _tfds(images: str, columns: Columns) -> tuple[list[DatasetFile], Columns]:
  name = images.removeprefix(TFDS)
  folder = Path(name).expanduser() if _is_path(name) else _tfds_folder(images, name)
  if not (folder / "dataset_info.json").is_file():
    raise FileNotFoundError(
      f"{images}: {folder} has no dataset_info.json, so it is not a dataset that TFDS prepared; "
      "name the directory of a version."
    )
  info, features = _read(folder / "dataset_info.json"), _read(folder / "features.json")
  given = info.get("fileFormat") or "tfrecord"
  if given not in _TFDS_FORMATS:
    raise ValueError(
      f"{images} is stored in the format {shown(given, 30)}; prepare it with "
      "file_format='array_record'."
    )
  splits = {one["name"]: one for one in info.get("splits", [])}
  split = splits[_choose("split", "--split", splits, columns.split, images)]
  lengths = [int(length) for length in split.get("shardLengths", [])]
  template = split.get("filepathTemplate") or _TFDS_TEMPLATE
  digits = max(5, len(str(len(lengths))))
  files = []
  for shard, rows in enumerate(lengths):
    index, count = f"{shard:0{digits}}", f"{len(lengths):0{digits}}"
    values = {
      "DATASET": info["name"], "SPLIT": split["name"], "FILEFORMAT": given, "SHARD_INDEX": index,
      "NUM_SHARDS": count, "SHARD_X_OF_Y": f"{index}-of-{count}",
    }  # fmt: skip
    file = re.sub(r"\{(\w+)\}", lambda found: values[found[1]], template)  # noqa: B023
    if rows:  # TFDS writes no file for an empty shard
      files.append(DatasetFile(folder / file, given, rows))
  return files, dataclasses.replace(columns, image=_tfds_image(images, features, columns))


def _tfds_folder(images: str, name: str) -> Path:
  """The directory of a version of a dataset."""
  top = Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
  name, _, version = name.partition(":")
  dataset, _, config = name.partition("/")
  folder = top / dataset
  missing = FileNotFoundError(
    f"{images} is not prepared in {top}; prepare it with tfds.data_source({name!r}), or set "
    "TFDS_DATA_DIR."
  )
  if not dataset or not folder.is_dir():
    raise missing
  if config or not _versions(folder):
    configs = [path.name for path in _directories(folder) if _versions(path)]
    default = folder / ".config" / "metadata.json"
    if not config and default.is_file():
      config = str(_read(default).get("default_config_name") or "")
    if (config and config not in configs) or not configs:
      raise missing
    folder /= _choose("configuration", f"{TFDS}{dataset}/NAME", configs, config or None, images)
  versions = _versions(folder)
  if not versions or (version and version not in versions):
    raise missing
  return folder / (version or versions[-1])


def _versions(folder: Path) -> list[str]:
  """The versions in a directory, the latest last."""
  found = [path.name for path in _directories(folder) if (path / "dataset_info.json").is_file()]
  parsed = [
    (tuple(map(int, m.groups())), name) for name in found if (m := _VERSION.fullmatch(name))
  ]
  return [name for _, name in sorted(parsed)]


def _tfds_image(images: str, description: Any, columns: Columns) -> str | None:
  """The feature with the images; the name of a nested one is `outer/inner`, as in its records."""
  kinds: dict[str, str] = {}
  pending = [("", description)]
  while pending:
    name, feature = pending.pop()
    kinds[name] = str(feature["pythonClassName"]).rpartition(".")[2]
    inner = feature.get("featuresDict", {}).get("features", {})
    pending += [(f"{name}/{key}" if name else key, value) for key, value in inner.items()]
  del kinds[""]
  if columns.image is not None:
    return columns.image  # compared with the records later
  found = sorted(name for name, kind in kinds.items() if kind == "Image")
  if found and "image" not in found:
    return _choose("image feature", "--image-column", found, None, images)
  if found:
    return "image"
  listed = ", ".join(f"{name} ({kind})" for name, kind in sorted(kinds.items()))
  raise ValueError(f"{images} has no feature with images; its features are {listed:.300}.")


def _hugging_face(images: str, columns: Columns) -> tuple[list[DatasetFile], Columns]:
  name = images.removeprefix(HUGGING_FACE)
  if not _is_path(name):
    return _cached(images, name, columns), columns
  folder = Path(name).expanduser()
  if (folder / "dataset_dict.json").is_file():
    splits = _read(folder / "dataset_dict.json")["splits"]
    folder /= _choose("split", "--split", splits, columns.split, images)
  elif not (folder / "state.json").is_file():
    raise FileNotFoundError(
      f"{images}: {folder} has no state.json or dataset_dict.json, so save_to_disk has not written "
      "it; check the path."
    )
  files = [one["filename"] for one in _read(folder / "state.json")["_data_files"]]
  return [DatasetFile(folder / file, "arrow", None) for file in files], columns


def _cached(images: str, name: str, columns: Columns) -> list[DatasetFile]:
  """The files of a dataset in the cache of Hugging Face datasets."""
  top = _cache()
  name, _, config = name.partition(":")
  *organization, dataset = name.split("/")
  # The cache has names in snake case.
  snake = re.sub(r"(?<=[a-z\d])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", dataset).lower()
  folder = top / "___".join([*organization, snake])
  configs = {path.name: found for path in _directories(folder) if (found := _prepared(path))}
  if not configs or (config and config not in configs):
    called = ", ".join(map(repr, filter(None, (name, config))))
    raise FileNotFoundError(
      f"{images} is not in {top}; prepare it with datasets.load_dataset({called}), or set "
      "HF_DATASETS_CACHE."
    )
  config = _choose("configuration", f"{HUGGING_FACE}{name}:NAME", configs, config or None, images)
  # As `datasets` does offline: the version that was prepared last.
  folder = max(configs[config], key=lambda path: (path.stat().st_mtime_ns, path.name))
  info = _read(folder / "dataset_info.json")
  splits = info["splits"]
  split = splits[_choose("split", "--split", splits, columns.split, images)]
  lengths = split.get("shard_lengths") or [split["num_examples"]]
  prefix = f"{split.get('dataset_name') or info['builder_name']}-{split['name']}"
  shards = [""]
  if len(lengths) > 1:
    shards = [f"-{shard:05}-of-{len(lengths):05}" for shard in range(len(lengths))]
  return [
    DatasetFile(folder / f"{prefix}{shard}.arrow", "arrow", int(rows))
    for shard, rows in zip(shards, lengths, strict=True)
  ]


def _cache() -> Path:
  """The directory where Hugging Face datasets are prepared."""
  if given := os.environ.get("HF_DATASETS_CACHE"):
    return Path(given).expanduser()
  cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
  return Path(home).expanduser() / "datasets"


def _prepared(config: Path) -> list[Path]:
  """The directories of a configuration that hold a prepared dataset: VERSION/HASH."""
  found = [path for version in _directories(config) for path in _directories(version)]
  return [path for path in found if (path / "dataset_info.json").is_file()]


def _is_path(name: str) -> bool:
  return name.startswith(("/", ".", "~"))


def _choose(what: str, how: str, names: Iterable[str], given: str | None, images: str) -> str:
  """The given name, or the only one.

  Args:
    what: the kind of things that have the names.
    how: how to choose one.
    names: of the things that exist.
    given: by the user; None to take the only one.
    images: the dataset.
  """
  names = list(names)
  if given is None and len(names) == 1:
    return names[0]
  if given in names:
    return given
  listed = ", ".join(names) or "(none)"
  if given is None:
    raise ValueError(f"{images} has several {what}s: {listed:.200}; choose one with {how}.")
  raise ValueError(f"{images} has no {what} {given!r:.80}, but {listed:.200}; check {how}.")


def _directories(folder: Path) -> list[Path]:
  """The directories in a directory, without unfinished ones, by name; none if there is none."""
  if not folder.is_dir():
    return []
  found = [path for path in folder.iterdir() if not path.name.endswith(".incomplete")]
  return sorted(path for path in found if path.is_dir() and path.name != ".config")


def _read(path: Path) -> Any:
  try:
    return parse(path.read_bytes(), str(path))
  except OSError as error:
    raise ValueError(
      f"{path} cannot be read ({error_text(error)}); prepare the dataset again."
    ) from error
