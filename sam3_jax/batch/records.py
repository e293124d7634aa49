"""The results of an image as a line of a part: plain values, masks as COCO run lengths."""

import json
from collections.abc import Sequence

from sam3_jax.batch.part_files import identity_to_json
from sam3_jax.batch.prompt_schema import AnyPrompt, prompt_to_json
from sam3_jax.outputs.coco_json import entries
from sam3_jax.outputs.instances import Instances
from sam3_jax.utils.identity import FileIdentity


def make_record(
  index: int | None,
  name: str,
  size: tuple[int, int],
  prompts: Sequence[AnyPrompt],
  results: Sequence[Instances],
  identity: FileIdentity | None = None,
) -> bytes:
  """A line of JSON.

  Args:
    index: of the input in the list; None for an image that is in no list.
    name: of the image.
    size: height and width of the image in pixels.
    prompts: of the image.
    results: the instances of each prompt.
    identity: of the file that was read.
  """
  height, width = size
  found = [
    {**prompt_to_json(prompt), "instances": entries(instances, size)}
    for prompt, instances in zip(prompts, results, strict=True)
  ]
  start = {} if index is None else {"input": index}
  file = {} if identity is None else {"file": identity_to_json(identity)}
  values = {**start, "image": name, "width": width, "height": height, **file, "prompts": found}
  return json.dumps(values, allow_nan=False, separators=(",", ":")).encode() + b"\n"
