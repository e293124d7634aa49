"""Parses a compiled program's text (HLO): its instructions, how often they run, the TPU compiler's
estimate of their cycles, and the traffic with a chip's memory and between chips."""

import collections
import dataclasses
import math
import re
from typing import NamedTuple

BYTES = {"bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
BYTES |= {"f64": 8, "s64": 8, "u64": 8}  # all others 1
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
# Instructions that take no time themselves.
FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element")
FREE += ("while", "conditional", "call", "partition-id")
# Instructions that read some rows of their first operand; those that update some of its rows, and
# which operand has the new ones.
SLICES = ("dynamic-slice", "gather")
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
INNER = r"(?:body|calls|to_apply|\w+_computation|branch_computations)=(\{[^}]*\}|%[\w.\-]+)"


class Collective(NamedTuple):
  """One instruction that moves data between chips.

  Attributes:
    kind: such as "all-gather".
    size: bytes of its result on each device; for a reduce-scatter fused on a TPU, before the slice.
    times: how often it runs, the product of the trip counts of the enclosing loops.
    scope: the part of the model that it belongs to.
  """

  kind: str
  size: int
  times: int
  scope: str


@dataclasses.dataclass(frozen=True)
class Op:
  """One scheduled instruction.

  Attributes:
    opcode: such as "fusion".
    scope: the part of the model that it belongs to.
    times: how often it runs.
    cycles: of one run, counted in the emitted code; 0 if that was not analysed.
    planned: of one run, from the coarse cost model that chooses the tiling; 0 if there is none.
    traffic: bytes read from and written to the chip's memory in one run, including the padding of
      tiles.
    result: its type, such as "bf16[5184,1024]{1,0}".
  """

  opcode: str
  scope: str
  times: int
  cycles: int
  planned: int
  traffic: int
  result: str

  def seconds(self, clock: float, bandwidth: float) -> float:
    """The time of all runs: the larger of computation and memory traffic. Asynchronous copies count
    as 0, as they overlap with other work."""
    if self.opcode in FREE or self.opcode.endswith(("-start", "-done")):
      return 0.0
    return self.times * max((self.cycles or self.planned) / clock, self.traffic / bandwidth)


class Listing(NamedTuple):
  """The instructions of a program.

  Attributes:
    ops: instructions that run in sequence, including those in loops.
    collectives: each once, although a TPU may split it over several fusions.
    unknown: number of loops without a known trip count; their bodies count once.
  """

  ops: list[Op]
  collectives: list[Collective]
  unknown: int


class _Line(NamedTuple):
  name: str
  result: str
  opcode: str
  rest: str


_Module = dict[str, list[_Line]]


def read(hlo: str) -> Listing:
  """Lists the instructions of a scheduled module."""
  module: _Module = collections.defaultdict(list)
  entry = name = ""
  for line in hlo.splitlines():
    if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
      name = header[2]
      entry = name if header[1] else entry
    elif found := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)", line):
      module[name].append(_Line(*found.groups()))
  types = {line.name: line.result for lines in module.values() for line in lines}
  listing, counted, unknown = Listing([], [], 0), set(), 0

  def visit(computation: str, times: int, scheduled: bool) -> None:
    nonlocal unknown
    for line in module[computation]:
      _, result, opcode, rest = line
      scope = _find(r'op_name="([^"]*)"', rest)
      # An asynchronous collective is a pair; the type of the second is the result alone.
      kind, channel = re.fullmatch(rf"({KINDS})(-done)?", opcode), _find(r"channel_id=(\d+)", rest)
      key = channel, scope, size(result)  # under shard_map, all have the same channel
      if kind and key not in counted:
        counted.update({key} if channel else ())
        # On a TPU, reduce-scatter is a fusion of this name of an all-reduce and a slice.
        name = "reduce-scatter" if "all-reduce-scatter" in computation else kind[1]
        listing.collectives.append(Collective(name, size(result), times, scope))
      if scheduled:
        emitted = _find(r'"bundle_analysis_data":\{"estimated_cycles":"(\d+)"', rest)
        # 2^63 means none.
        planned = _find(r'"window_config":\{[^}]*"estimated_cycles":"(\d{1,17})"', rest)
        listing.ops.append(
          Op(
            opcode, scope, times, int(emitted or 0), int(planned or 0),
            _traffic(module, types, line), result,
          )
        )  # fmt: skip
      trips = 1
      if opcode == "while":
        trips = _trips(module, rest)
        unknown, trips = unknown + (trips is None), trips or 1
      for group in re.findall(INNER, rest):
        for called in re.findall(r"%([\w.\-]+)", group):
          visit(called, times * trips, scheduled and opcode in ("while", "call", "conditional"))

  visit(entry, 1, True)
  return listing._replace(unknown=unknown)


def aliases(text: str) -> dict[str, int]:
  """The outputs of a module that overwrite an argument: the index of each output, such as "0", and
  the number of the argument."""
  [header, *_] = text.splitlines()
  return {
    output: int(argument)
    for output, argument in re.findall(r"\{([\d, ]*)\}: \((\d+), \{\}, \w+-alias\)", header)
  }


def rewrites(listing: Listing, array: str) -> list[Op]:
  """Instructions that move at least a whole array, such as "bf16[64,20,64,5184]", in order to
  return one of that type; in any layout. Updates in place are none of them."""
  return [
    op
    for op in listing.ops
    if op.opcode not in FREE and array in op.result and op.traffic >= size(array)
  ]


def size(result: str, in_memory: bool = False) -> int:
  """Bytes of a type such as (f32[8,128]{1,0}, bf16[4]{0}). `in_memory` skips arrays in a TPU's
  vector memory, and adds the padding of tiles."""
  total = 0
  for kind, dims, order, layout in re.findall(
    r"\b([a-z]+\d*)\[([\d,]*)\](?:\{([\d,]*)(:[^}]*)?\})?", result
  ):
    sides = [int(d) for d in dims.split(",") if d]
    tile = _find(r"T\(([\d,]+)\)", layout)
    if in_memory and sides and tile:
      for axis, step in zip(order.split(","), reversed(tile.split(",")), strict=False):
        sides[int(axis)] = -(-sides[int(axis)] // int(step)) * int(step)
    elsewhere = in_memory and re.search(r"S\([1-9]", layout)
    total += 0 if elsewhere else math.prod(sides) * BYTES.get(kind, 1)
  return total


def _find(pattern: str, text: str) -> str:
  found = re.search(pattern, text)
  return found[1] if found else ""


def _trips(module: _Module, rest: str) -> int | None:
  """The trip count of a loop: the compiler's note, or the only constant of its condition; None if
  there is neither."""
  if known := _find(r'"known_trip_count":\{"n":"(\d+)"', rest):
    return int(known)
  condition = module[_find(r"condition=%([\w.\-]+)", rest)]
  limits = [
    line.rest.split(")")[0]
    for line in condition
    if line.opcode == "constant" and line.result.startswith("s32[]")
  ]
  return int(limits[0]) if len(limits) == 1 else None


def _traffic(module: _Module, types: dict[str, str], line: _Line) -> int:
  """Bytes moved between the chip and its memory in one run. Slices, gathered rows and in-place
  updates move only these, also inside a fusion."""
  out, operands = size(line.result, True), _names(line.rest)
  if line.opcode.endswith("-start"):  # its type includes the source
    return size(line.result) - sum(size(types.get(name, "")) for name in operands)
  if line.opcode in SLICES:
    return 2 * out
  called = _find(r"calls=%([\w.\-]+)", line.rest)
  updates = [
    size(types[_names(inner.rest)[UPDATES[inner.opcode]]])
    for inner in module[called]
    if inner.opcode in UPDATES
  ]
  sizes = [size(types.get(name, ""), True) for name in operands]
  if line.opcode == "fusion":
    sizes = [_read(module, called, i, whole) if whole else 0 for i, whole in enumerate(sizes)]
  return min([*updates, out]) + sum(sizes)


def _read(module: _Module, fusion: str, index: int, whole: int) -> int:
  """Bytes that a fusion reads of parameter `index`, which has `whole` bytes."""
  parameter = next(
    (x.name for x in module[fusion] if x.opcode == "parameter" and x.rest.startswith(f"{index})")),
    "",
  )
  total = 0
  for line in module[fusion]:
    operands = _names(line.rest)
    if parameter not in operands:
      continue
    if line.opcode == "fusion":
      inner = _find(r"calls=%([\w.\-]+)", line.rest)
      total += _read(module, inner, operands.index(parameter), whole)
    elif line.opcode in SLICES and operands[0] == parameter:
      total += size(line.result)
    elif line.opcode not in UPDATES or operands[0] != parameter:
      total += whole
  return min(total, whole)


def _names(rest: str) -> list[str]:
  """Of an instruction's operands."""
  return re.findall(r"%([\w.\-]+)", rest.split(")", 1)[0])
