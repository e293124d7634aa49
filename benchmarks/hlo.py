"""What a compiled program's text (HLO) says: which instructions run, how often, how many cycles the
TPU compiler expects of each, what moves to and from a chip's memory, and between chips."""

import collections
import dataclasses
import math
import re
from typing import NamedTuple

BYTES = {"bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
BYTES |= {"f64": 8, "s64": 8, "u64": 8}  # all others 1
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
# What takes no time of its own.
FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element")
FREE += ("while", "conditional", "call", "partition-id")
INNER = r"(?:body|calls|to_apply|\w+_computation|branch_computations)=(\{[^}]*\}|%[\w.\-]+)"


class Collective(NamedTuple):
  """One instruction that moves data between chips.

  Attributes:
    kind: such as "all-gather".
    size: bytes of its result on each device; of a reduce-scatter fused on a TPU, before the cut.
    times: how often it runs: the product of the trip counts of the loops around it.
    scope: where in the model it comes from.
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
    scope: where in the model it comes from.
    times: how often it runs.
    cycles: of one run, counted in the emitted code; 0 where that was not analysed.
    planned: of one run, by the coarse cost model that chose the tiling; 0 where there is none.
    traffic: bytes of one run that it reads from and writes to the chip's memory, tiles' padding
      included.
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
    """Of all runs: the larger of computing and memory traffic. Asynchronous copies overlap with
    other work and take none."""
    if self.opcode in FREE or self.opcode.endswith(("-start", "-done")):
      return 0.0
    return self.times * max((self.cycles or self.planned) / clock, self.traffic / bandwidth)


class Listing(NamedTuple):
  """Attributes:
  ops: that run one after another, in loops too.
  collectives: once each, though a TPU may run one beside other work in several fusions.
  unknown: how many loops do not tell how often they run, and count once.
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
  """Lists what a scheduled module runs."""
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
      # An asynchronous one is a pair; the second's type is the result alone.
      kind, channel = re.fullmatch(rf"({KINDS})(-done)?", opcode), _find(r"channel_id=(\d+)", rest)
      one = channel, scope, size(result)  # under shard_map, all have the same channel
      if kind and one not in counted:
        counted.update({one} if channel else ())
        # A TPU's reduce-scatter is a fusion of this name, of an all-reduce and a slice of it.
        name = "reduce-scatter" if "all-reduce-scatter" in computation else kind[1]
        listing.collectives.append(Collective(name, size(result), times, scope))
      if scheduled:
        emitted = _find(r'"bundle_analysis_data":\{"estimated_cycles":"(\d+)"', rest)
        # 2^63 stands for none.
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


def size(result: str, in_memory: bool = False) -> int:
  """Bytes of a type such as (f32[8,128]{1,0}, bf16[4]{0}); `in_memory` leaves out what lies in a
  TPU's vector memory, and pads to tiles."""
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
  """How often a loop runs: as the compiler notes it, or the one constant of its condition; None if
  neither tells."""
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
  """Bytes of one run between the chip and its memory. Slices, and updates in place, move the slice
  only, also inside a fusion."""
  out, operands = size(line.result, True), _names(line.rest)
  if line.opcode.endswith("-start"):  # its type holds the source too
    return size(line.result) - sum(size(types.get(name, "")) for name in operands)
  if line.opcode == "dynamic-slice":
    return 2 * out
  called = _find(r"calls=%([\w.\-]+)", line.rest)
  updates = [
    size(types[_names(inner.rest)[1]])
    for inner in module[called]
    if inner.opcode == "dynamic-update-slice"
  ]
  sizes = [size(types.get(name, ""), True) for name in operands]
  if line.opcode == "fusion":
    sizes = [_read(module, called, i, whole) if whole else 0 for i, whole in enumerate(sizes)]
  return min([*updates, out]) + sum(sizes)


def _read(module: _Module, fusion: str, index: int, whole: int) -> int:
  """Bytes that a fusion reads of its parameter number `index`, of `whole` bytes."""
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
    elif line.opcode == "dynamic-slice":
      total += size(line.result)
    elif line.opcode != "dynamic-update-slice" or operands[0] != parameter:
      total += whole
  return min(total, whole)


def _names(rest: str) -> list[str]:
  """Of an instruction's operands."""
  return re.findall(r"%([\w.\-]+)", rest.split(")", 1)[0])
