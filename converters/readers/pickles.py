"""Reads PyTorch's pickles as data: nothing can be imported or called.

A pickle is a program: `GLOBAL os system`, then `REDUCE`, runs a command. Python's own unpickler can
restrict the globals, but not its memory: one opcode makes it reserve gigabytes for its memo. So
this module interprets the opcodes that torch.save emits (protocol 2, and the additions of 4 and 5),
and a global is only a name. `CONSTRUCTORS` and `STORAGES` are the names with a meaning, `INERT` the
names that are ignored; any other is refused. Source: the descriptions of opcodes in Python's
pickletools.
"""

import dataclasses
import re
import struct
from collections.abc import Callable
from typing import Any

from sam3_jax.utils.json_text import shown

STORAGES = {
  "DoubleStorage": "float64",
  "FloatStorage": "float32",
  "HalfStorage": "float16",
  "BFloat16Storage": "bfloat16",
  "LongStorage": "int64",
  "IntStorage": "int32",
  "ShortStorage": "int16",
  "CharStorage": "int8",
  "ByteStorage": "uint8",
  "BoolStorage": "bool",
  "ComplexFloatStorage": "complex64",
}
# Classes whose objects training programs save beside a model. They are ignored, and none is
# imported: here they are only names.
INERT = (
  r"argparse\.Namespace|collections\.defaultdict|datetime\.\w+|_codecs\.encode|copyreg\._reconstructor"
  r"|copy_reg\._reconstructor|pathlib\.(_local\.)?\w*Path"
  r"|(__builtin__|builtins)\.(object|set|frozenset|dict|list|tuple|int|long|float|str|bool)"
  r"|numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|dtype|ndarray|dtypes\.\w+)"
  r"|torch\.(Size|device|dtype|float\w*|bfloat16|int\w*|uint8|bool)"
  r"|(omegaconf|lightning|lightning_fabric|pytorch_lightning)\.[\w.]+"
)
MAX_BYTES = 8_000_000  # sam3.pt has 0.3 million; a byte may take 70 bytes of memory
MAX_NAME = 1000  # bytes of the name of a module, or of a name in it


@dataclasses.dataclass(frozen=True)
class Global:
  """The name of a global, without the object."""

  name: str


class Inert:
  """A placeholder for an object of a class in `INERT`; its contents are not kept."""


@dataclasses.dataclass(frozen=True)
class Storage:
  """The file of the archive that holds a tensor's elements."""

  key: str
  dtype: str
  elements: int


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A view of a storage; offset and strides are in elements."""

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


def read_pickle(data: bytes) -> Any:
  """Returns the contents of a pickle: None, numbers, strings, tuples, lists, dictionaries and
  `Tensor`s, and `Inert` for ignored objects.

  Raises:
    ValueError: it names an unknown global, is truncated, or was not written by torch.save.
  """
  if len(data) > MAX_BYTES:
    raise ValueError(f"its pickle of {len(data):,} bytes is larger than {MAX_BYTES:,}")
  machine = _Machine(data)
  try:
    return machine.run()
  except (IndexError, KeyError, TypeError, struct.error, UnicodeDecodeError) as error:
    raise ValueError(
      f"its pickle is damaged at byte {machine.position} ({type(error).__name__})"
    ) from error


class _Machine:
  """An interpreter: its stack, its memo, and its position in the data."""

  def __init__(self, data: bytes):
    self.data, self.position = data, 0
    self.stack: list[Any] = []
    self.marks: list[int] = []
    self.memo: dict[int, Any] = {}

  def run(self) -> Any:
    while True:
      code = self.take(1)
      if code == b".":
        return self.stack.pop()
      if code not in _OPCODES:
        raise ValueError(f"its pickle has an opcode {code!r}, which torch.save does not write")
      _OPCODES[code](self)

  def take(self, count: int) -> bytes:
    piece = self.data[self.position : self.position + count]
    if count < 0 or len(piece) < count:
      raise ValueError("its pickle is truncated")
    self.position += count
    return piece

  def number(self, kind: str) -> Any:
    return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

  def line(self) -> str:
    end = self.data.find(b"\n", self.position, self.position + MAX_NAME)
    return self.take(end + 1 - self.position)[:-1].decode()

  def since_mark(self) -> list[Any]:
    start = self.marks.pop()
    items, self.stack[start:] = self.stack[start:], []
    return items

  def pop(self, count: int) -> list[Any]:
    if len(self.stack) < count:
      raise IndexError(count)
    items, self.stack[len(self.stack) - count :] = self.stack[len(self.stack) - count :], []
    return items

  def find(self, module: Any, name: Any) -> None:
    """Pushes a known global; refuses others."""
    if not isinstance(module, str) or not isinstance(name, str):
      raise TypeError("STACK_GLOBAL")
    full = f"{module}.{name}"
    if full in CONSTRUCTORS or (module == "torch" and name in STORAGES):
      self.stack.append(Global(full))
    elif re.fullmatch(INERT, full, re.ASCII):
      self.stack.append(Inert())
    else:
      raise ValueError(_unknown(full))

  def reduce(self) -> None:
    """Calls one of our own constructors; no other function can be reached."""
    function, arguments = self.pop(2)
    if isinstance(function, Inert):
      self.stack.append(Inert())
      return
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
      raise TypeError("REDUCE")
    constructor = CONSTRUCTORS.get(function.name)
    if constructor is None:
      raise ValueError(f"its pickle calls {function.name}, which is not a function")
    self.stack.append(constructor(*arguments))

  def build(self) -> None:
    """Ignores the state of an object: a dictionary's attributes (`_metadata`)."""
    target, _ = self.pop(2)
    if not isinstance(target, dict | Inert):
      raise ValueError(f"its pickle sets attributes of a {type(target).__name__}")
    self.stack.append(target)

  def persistent(self) -> None:
    """Pushes the storage that a persistent id describes."""
    (identity,) = self.pop(1)
    if not isinstance(identity, tuple) or len(identity) != 5:
      raise ValueError(f"its pickle refers to {shown(identity)} where a storage is expected")
    kind, storage, key, _, elements = identity
    name = storage.name.rpartition(".")[2] if isinstance(storage, Global) else None
    if kind != "storage" or name not in STORAGES or not isinstance(key, str):
      raise ValueError(f"its pickle refers to {shown(kind)} where a storage is expected")
    self.stack.append(Storage(key, STORAGES[name], _size(elements)))

  def set_items(self, items: list[Any]) -> None:
    target = self.stack[-1]
    if isinstance(target, Inert):
      return
    if not isinstance(target, dict) or len(items) % 2:
      raise TypeError("SETITEMS")
    for key, value in zip(items[::2], items[1::2], strict=True):
      if isinstance(key, Inert):
        continue
      if not isinstance(key, str | int | float | None):  # hashing a tuple may recurse too deep
        raise ValueError(f"its pickle has a key of type {type(key).__name__}; expected a string")
      if key in target:
        raise ValueError(f"{key!r:.120} is there twice")
      target[key] = value

  def append(self, items: list[Any]) -> None:
    if isinstance(self.stack[-1], Inert):
      return
    if not isinstance(self.stack[-1], list):
      raise TypeError("APPEND")
    self.stack[-1].extend(items)


def _unknown(name: str) -> str:
  """The message for an unknown global."""
  if name in ("torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_qtensor"):
    return f"it has quantized or float8 tensors ({name}), which cannot be converted"
  kind = next((words for start, words in _CLASSES.items() if name.startswith(start)), "")
  return (
    f"its pickle asks for {name!r:.120}, which no checkpoint of SAM 3 needs: it was not called"
    f"{f' (the file is {kind}, saved as Python objects and not as tensors)' if kind else ''}"
  )


def _size(value: Any) -> int:
  if type(value) is not int or not 0 <= value < 2**63:
    raise ValueError(f"its pickle has the size {shown(value)}; expected an integer of 0 or more")
  return value


def _sizes(values: Any) -> tuple[int, ...]:
  if not isinstance(values, tuple) or len(values) > 32:
    raise ValueError("its pickle has a tensor of more than 32 axes, or with a damaged shape")
  return tuple(_size(value) for value in values)


def _ordered_dict(*items: Any) -> dict[Any, Any]:
  if items:
    raise ValueError("its pickle fills an OrderedDict in one call, which torch.save does not")
  return {}


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
  """torch._utils._rebuild_tensor_v2(storage, storage_offset, size, stride, requires_grad, ..)."""
  shape, strides = _sizes(shape), _sizes(strides)
  if not isinstance(storage, Storage) or len(shape) != len(strides):
    raise ValueError("its pickle makes a tensor of something that is not a storage")
  return Tensor(storage, _size(offset), shape, strides)


def _parameter(tensor: Any, *_: Any) -> Tensor:
  """torch._utils._rebuild_parameter(data, requires_grad, backward_hooks)."""
  if not isinstance(tensor, Tensor):
    raise ValueError("its pickle makes a parameter of something that is not a tensor")
  return tensor


CONSTRUCTORS: dict[str, Callable[..., Any]] = {
  "collections.OrderedDict": _ordered_dict,
  "torch._utils._rebuild_tensor_v2": _tensor,
  "torch._utils._rebuild_parameter": _parameter,
}


def _push(read: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
  return lambda m: m.stack.append(read(m))


def _remember(read: Callable[[_Machine], int]) -> Callable[[_Machine], None]:
  return lambda m: m.memo.__setitem__(read(m), m.stack[-1])


def _text(kind: str) -> Callable[[_Machine], None]:
  return _push(lambda m: m.take(m.number(kind)).decode("utf-8", "surrogatepass"))


def _byte(kind: str) -> Callable[[_Machine], int]:
  return lambda m: m.number(kind)


_CLASSES = {
  "ultralytics.": "a model of ultralytics, such as YOLO",
  "models.yolo": "a YOLO",
  "models.common": "a YOLO",
  "torch.nn.": "a whole PyTorch model",
  "sam3.": "a whole model of Meta's package",
  "transformers.": "a whole model or the settings of transformers",
  "torchvision.": "a whole model of torchvision",
  "timm.": "a whole model of timm",
}
_OPCODES: dict[bytes, Callable[[_Machine], Any]] = {
  b"\x80": lambda m: m.take(1),  # PROTO
  b"\x95": lambda m: m.take(8),  # FRAME
  b"(": lambda m: m.marks.append(len(m.stack)),
  b"N": _push(lambda m: None),
  b"\x88": _push(lambda m: True),
  b"\x89": _push(lambda m: False),
  b"J": _push(_byte("<i")),
  b"K": _push(_byte("<B")),
  b"M": _push(_byte("<H")),
  b"G": _push(_byte(">d")),
  b"\x8a": _push(lambda m: int.from_bytes(m.take(m.number("<B")), "little", signed=True)),
  b"X": _text("<I"),
  b"\x8c": _text("<B"),
  b"B": _push(lambda m: m.take(m.number("<I"))),
  b"C": _push(lambda m: m.take(m.number("<B"))),
  b")": _push(lambda m: ()),
  b"t": _push(lambda m: tuple(m.since_mark())),
  b"\x85": _push(lambda m: tuple(m.pop(1))),
  b"\x86": _push(lambda m: tuple(m.pop(2))),
  b"\x87": _push(lambda m: tuple(m.pop(3))),
  b"]": _push(lambda m: []),
  b"a": lambda m: m.append(m.pop(1)),
  b"e": lambda m: m.append(m.since_mark()),
  b"}": _push(lambda m: {}),
  b"s": lambda m: m.set_items(m.pop(2)),
  b"u": lambda m: m.set_items(m.since_mark()),
  b"q": _remember(_byte("<B")),
  b"r": _remember(_byte("<I")),
  b"\x94": _remember(lambda m: len(m.memo)),
  b"h": _push(lambda m: m.memo[m.number("<B")]),
  b"j": _push(lambda m: m.memo[m.number("<I")]),
  b"c": lambda m: m.find(m.line(), m.line()),
  b"i": lambda m: m.find(m.line(), m.line()),  # INST
  b"\x93": lambda m: m.find(*m.pop(2)),
  b"R": lambda m: m.reduce(),
  b"\x81": lambda m: m.reduce(),  # NEWOBJ
  b"b": lambda m: m.build(),
  b"Q": lambda m: m.persistent(),
}
