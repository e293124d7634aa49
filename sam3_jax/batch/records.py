"""An image's results as a line of a part: plain values, masks as COCO's run lengths."""

import json
from collections.abc import Sequence

from sam3_jax.batch.part_files import identity_json
from sam3_jax.batch.prompt_schema import AnyPrompt, as_json
from sam3_jax.outputs.coco_json import entries
from sam3_jax.outputs.instances import Instances
from sam3_jax.utils.identity import FileIdentity


def record(
  number: int | None,
  name: str,
  size: tuple[int, int],
  prompts: Sequence[AnyPrompt],
  found: Sequence[Instances],
  identity: FileIdentity | None = None,
) -> bytes:
  """A line of JSON.

  Args:
    number: the input's place in the list; None for an input of no list.
    name: of the image.
    size: its height and width in pixels.
    prompts: what was asked.
    found: what was found for each.
    identity: of the file that was read.
  """
  height, width = size
  asked = [
    {**as_json(prompt), "instances": entries(one, size)}
    for prompt, one in zip(prompts, found, strict=True)
  ]
  row = {} if number is None else {"input": number}
  file = {} if identity is None else {"file": identity_json(identity)}
  values = {**row, "image": name, "width": width, "height": height, **file, "prompts": asked}
  return json.dumps(values, allow_nan=False, separators=(",", ":")).encode() + b"\n"
