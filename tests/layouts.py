"""The tiny model in the layouts of other programs, written without the converters.

Columns of goldens/tiny_names.tsv: name in Meta's layout (`*` for a layer), name in Hugging Face's
(`-` for none), and how the second follows from the first. It is an excerpt of a list of the names
of both full-size models.
"""

import functools
import json
import pathlib
import re

import numpy as np
from golden_model import GOLDENS, meta_weights
from safetensors.numpy import save_file

TOKENIZER = pathlib.Path(__file__).parent / "goldens" / "tokenizer.model"
DETECTOR, TRACKER = "detector_model.", "tracker_model."


@functools.cache
def huggingface_weights() -> dict[str, np.ndarray]:
  """All tensors of the tiny model, tracker included, under facebook/sam3's names."""
  rows = [line.split("\t") for line in (GOLDENS / "tiny_names.tsv").read_text().splitlines()]
  patterns = [(re.compile(re.escape(row[0]).replace(r"\*", r"(\d+)")), row) for row in rows]
  weights, rows_of_4 = {}, {}
  for name, array in meta_weights("").items():
    for pattern, (_, target, *how) in patterns:
      if target == "-" or not (match := pattern.fullmatch(name)):
        continue
      target = target.replace("*", match[1]) if match.groups() else target
      match how:
        case []:
          weights[target] = array
        case [part] if part.endswith("/3"):
          weights[target] = np.split(array, 3)[int(part[0])]
        case ["T"]:
          weights[target] = array.T
        case ["[:,1:]"]:
          weights[target] = array[:, 1:]
        case [row]:
          rows_of_4.setdefault(target, {})[int(row.split()[1])] = array[0]
  for target, found in rows_of_4.items():
    weights[target] = np.stack([found[row] for row in range(4)])
  return weights


def layout(kind: str) -> dict[str, np.ndarray]:
  """Returns the tensors in a layout.

  Args:
    kind: hub (as facebook/sam3), doubled, detector or tracker (see converters/layouts/
      huggingface.py), or meta.
  """
  hub = huggingface_weights()
  if kind == "meta":
    return meta_weights("")
  if kind == "doubled":
    return {
      n.replace(TRACKER, TRACKER * 2) if n.startswith(TRACKER) else n: a for n, a in hub.items()
    }
  if kind == "detector":
    return {n.removeprefix(DETECTOR): a for n, a in hub.items() if n.startswith(DETECTOR)}
  if kind == "tracker":
    trunk = {n: a for n, a in hub.items() if n.startswith(f"{DETECTOR}vision_encoder.")}
    rest = {n: a for n, a in hub.items() if not n.startswith(DETECTOR)}
    return {TRACKER + name: array for name, array in (trunk | rest).items()}
  return hub


def write_folder(folder: pathlib.Path, arrays: dict[str, np.ndarray], shards: int = 1, config=None):
  """Writes a directory as transformers does, without vocabulary; returns it."""
  folder.mkdir()
  contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
  if shards == 1:
    save_file(contiguous, folder / "model.safetensors")
  else:
    names = sorted(contiguous)
    shard_of = {
      name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)
    }
    for shard in set(shard_of.values()):
      save_file({n: contiguous[n] for n in names if shard_of[n] == shard}, folder / shard)
    index = {"metadata": {}, "weight_map": shard_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  (folder / "config.json").write_text(json.dumps(config or tiny_config()))
  return folder


def tiny_config() -> dict:
  """transformers' config.json of the tiny model."""
  return json.loads((GOLDENS / "tiny_hf_config.json").read_text())
