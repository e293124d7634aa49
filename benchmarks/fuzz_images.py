"""Fuzzes the image readers of `segment` and `batch`, and a few images through the commands.

    python benchmarks/fuzz_images.py --count 500 --seed 0

Images of all supported formats are truncated, bit-flipped, spliced, given other header fields,
turned into decompression bombs, or replaced by PostScript, PDF, archives, pipes etc. A subprocess
reads each of them by header, by path, by bytes and as `batch` does. Faults are crashes, more than
30 seconds, more than 1.5 GB of memory, anything but a one-line ValueError or FileNotFoundError, and
readers that disagree. Prints a summary; exits with 1 if there is a fault.
"""

import argparse
import functools
import io
import json
import os
import random
import resource
import select
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

SECONDS, BYTES, LETTERS = 30, 1_500_000_000, 400
CHUNK = 100  # images per subprocess
COMMANDS = 10  # images given to the commands
VALUES = (0, 1, 2, 7, 8, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1)
FOREIGN = {
  "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n%%EOF\n",
  "pdf": b"%PDF-1.4\n1 0 obj\n<</Type/Catalog>>\nendobj\n",
  "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><rect width='9e9' height='9e9'/></svg>",
  "zip": b"PK\x03\x04" + bytes(60),
  "gzip": b"\x1f\x8b\x08\0" + bytes(60),
  "html": b"<!DOCTYPE html><html><body>404</body></html>",
  "mp4": b"\0\0\0\x18ftypisom\0\0\2\0isomiso2",
  "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
  "wmf": b"\xd7\xcd\xc6\x9a" + bytes(60),
  "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(60),
  "text": b"photo\n" * 40,
  "escapes": b"\x1b[2J\x1b]0;title\x07" * 9,
  "empty": b"",
}


class Mutant(NamedTuple):
  """A file: its name and its bytes; None for a pipe without a writer."""

  name: str
  data: bytes | None


@functools.cache
def base_images() -> dict[str, bytes]:
  """Valid images of all supported formats, in several variants."""
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 256, (48, 64, 3), np.uint8)
  smooth = np.linspace(20, 235, 64 * 48 * 3).reshape(48, 64, 3).astype(np.uint8)
  color, grey = Image.fromarray(smooth), Image.fromarray(noise[..., 0])
  deep = Image.fromarray(rng.integers(0, 65536, (48, 64), np.uint16))
  clear = Image.fromarray(np.concatenate([noise, noise[..., :1]], -1))
  several = {"save_all": True, "append_images": [color.rotate(9), color.rotate(18)]}
  exif = Image.Exif()
  exif[0x0112] = 6
  exif[0x010E] = "description " * 9
  forms: dict[str, tuple[str, Image.Image, dict[str, Any]]] = {
    "jpg": ("JPEG", color, {"exif": exif}),
    "progressive.jpg": ("JPEG", color, {"progressive": True}),
    "cmyk.jpg": ("JPEG", color.convert("CMYK"), {}),
    "mpo": ("MPO", color, several),
    "png": ("PNG", color, {"exif": exif, "icc_profile": bytes(5000)}),
    "palette.png": ("PNG", color.quantize(16), {"transparency": 3}),
    "deep.png": ("PNG", deep, {}),
    "apng": ("PNG", color, several),
    "webp": ("WEBP", color, {"exif": exif}),
    "lossless.webp": ("WEBP", clear, {"lossless": True}),
    "animated.webp": ("WEBP", color, several),
    "tif": ("TIFF", color, {"exif": exif}),
    "lzw.tif": ("TIFF", grey, {"compression": "tiff_lzw"}),
    "jpeg.tif": ("TIFF", color, {"compression": "jpeg"}),
    "deflate.tif": ("TIFF", deep, {"compression": "tiff_adobe_deflate"}),
    "fax.tif": ("TIFF", grey.convert("1"), {"compression": "group4"}),
    "pages.tif": ("TIFF", color, several),
    "gif": ("GIF", color.quantize(64), {}),
    "animated.gif": ("GIF", color, several),
    "bmp": ("BMP", color, {}),
    "palette.bmp": ("BMP", color.quantize(16), {}),
    "dib": ("DIB", color, {}),
    "jp2": ("JPEG2000", color, {}),
    "deep.jp2": ("JPEG2000", deep, {}),
    "tiled.j2k": ("JPEG2000", color, {"tile_size": (16, 16), "no_jp2": True}),
    "avif": ("AVIF", color, {"exif": exif}),
    "ppm": ("PPM", color, {}),
    "pgm": ("PPM", deep, {}),
    "tga": ("TGA", clear, {"compression": "tga_rle"}),
  }
  made = {}
  for name, (form, image, options) in forms.items():
    file = io.BytesIO()
    if "append_images" in options:  # saving changes their settings
      options = options | {"append_images": [one.copy() for one in options["append_images"]]}
    image.copy().save(file, form, **options)
    made[name] = file.getvalue()
  made["plain.ppm"] = b"P3\n8 8\n255\n" + b" ".join(
    b"%d" % value for value in noise[0].ravel()[:192]
  )
  return made


def truncated(rng: random.Random, data: bytes) -> bytes:
  return data[: rng.randrange(len(data))]


def flipped(rng: random.Random, data: bytes) -> bytes:
  result = bytearray(data)
  reach = len(data) if rng.random() < 0.5 else min(len(data), 200)
  for _ in range(rng.choice((1, 2, 8, 50))):
    result[rng.randrange(reach)] ^= 1 << rng.randrange(8)
  return bytes(result)


def other_fields(rng: random.Random, data: bytes) -> bytes:
  """Replaces integers in the header by extreme ones."""
  result = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 4))):
    size, order = rng.choice((1, 2, 4)), rng.choice("<>")
    value = (rng.choice(VALUES) % 256**size).to_bytes(size, "little" if order == "<" else "big")
    reach = len(data) if rng.random() < 0.3 else min(len(data), 120)
    at = rng.randrange(max(1, reach - size))
    result[at : at + size] = value
  return bytes(result)


def other_size(rng: random.Random, data: bytes) -> bytes:
  """Replaces all occurrences of the image's width and height by large values."""
  sides = rng.choice(((16_000, 16_000), (60_000, 50_000), (65_535, 4_000), (2**31 - 1, 2)))
  result = data
  for form in ("<H", ">H", "<I", ">I"):
    for side, new in zip((64, 48), sides, strict=True):
      old = struct.pack(form, side)
      wide = struct.pack(form, new % 256 ** len(old))
      result = result[:8] + result[8:300].replace(old, wide) + result[300:]
  if data[:4] == b"\x89PNG":
    result = result[:29] + struct.pack(">I", zlib.crc32(result[12:29])) + result[33:]
  if data[12:16] == b"VP8X":
    result = data[:24] + b"".join((s % 2**24).to_bytes(3, "little") for s in sides) + data[30:]
  return result


def repeated(rng: random.Random, data: bytes) -> bytes:
  """Repeats a part of the data many times."""
  start = rng.randrange(len(data))
  part = data[start : start + rng.choice((4, 64, 1024))]
  return data[:start] + part * rng.choice((2, 50, 2000)) + data[start:]


def spliced(rng: random.Random, data: bytes) -> bytes:
  other = rng.choice(list(base_images().values()))
  at = rng.randrange(1, 60)
  return rng.choice((data[:at] + other[at:], other + data, data + other))


def chunk(kind: bytes, data: bytes) -> bytes:
  return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@functools.cache
def extras() -> list[bytes]:
  """Chunks of a PNG with large texts."""
  text = zlib.compress(bytes(10**7), 9)
  packed = [chunk(kind, b"a\0\0" + text) for kind in (b"zTXt", b"iCCP")]
  return [b"", *packed, chunk(b"tEXt", b"a\0" + b"b" * 10**6) * 80]


def bomb(rng: random.Random, data: bytes) -> bytes:
  """A small PNG file with many pixels or large texts."""
  side = rng.choice((10_000, 16_000, 17_300, 40_000))
  kind, row = rng.choice(((0, side), (2, 3 * side), (6, 4 * side)))
  packer = zlib.compressobj(9)
  rows = side if side * row < 4e8 else 100  # if larger, only the header claims the size
  pixels = b"".join(packer.compress(bytes(row + 1)) for _ in range(rows)) + packer.flush()
  extra = rng.choice(extras())
  header = struct.pack(">IIBBBBB", side, side, 8, kind, 0, 0, 0)
  start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra
  return start + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


KINDS: tuple[tuple[Callable[[random.Random, bytes], bytes], int], ...] = (
  (truncated, 4), (flipped, 6), (other_fields, 6), (other_size, 3), (repeated, 2), (spliced, 1),
  (bomb, 1),
)  # fmt: skip


def mutants(count: int, seed: int, *, bombs: bool = True) -> Iterator[Mutant]:
  """Yields `count` mutants of all variants in turn. Bombs take seconds to make."""
  kinds = KINDS if bombs else [kind for kind in KINDS if kind[0] is not bomb]
  rng = random.Random(seed)
  bases = base_images()
  foreign = list(FOREIGN.items())
  for number in range(count):
    name = list(bases)[number % len(bases)]
    suffix = name.rpartition(".")[2] if rng.random() < 0.9 else rng.choice(("png", "jpg", "tif"))
    if number % 20 == 19:
      kind, data = rng.choice([*foreign, *[("pipe", None)] * 4])
      yield Mutant(f"{number:04}-{kind}.{suffix}", data)
      continue
    (mutate,) = rng.choices([one for one, _ in kinds], [weight for _, weight in kinds])
    data = mutate(rng, bases[name])
    yield Mutant(f"{number:04}-{mutate.__name__}-{name.partition('.')[0]}.{suffix}", data)


def write(folder: Path, found: Mutant) -> Path:
  path = folder / found.name
  if found.data is None:
    os.mkfifo(path)
  else:
    path.write_bytes(found.data)
  return path


def read_all(path: Path) -> dict[str, str]:
  """The result of each reader: the size or the error message."""
  from sam3_jax.batch.image_bytes import ImageFile
  from sam3_jax.batch.load_image import load_image
  from sam3_jax.inputs.preprocess import displayed_size, read_image

  def result(read: Callable[[], Any]) -> str:
    try:
      return "size {} {}".format(*read())
    except (ValueError, FileNotFoundError) as error:
      return str(error)
    except BaseException as error:
      return f"FAULT {type(error).__name__}: {error}"

  found = {
    "header": result(lambda: displayed_size(path)),
    "path": result(lambda: read_image(path).shape[:2]),
  }
  if path.is_file():
    data = path.read_bytes()
    found["bytes"] = result(lambda: read_image(data).shape[:2])
  one = load_image(ImageFile(path.name, str(path), None, None), 64, 300_000_000)
  found["batch"] = one.reason or "size {} {}".format(*one.size)
  return found


def faults_of(results: dict[str, str]) -> list[str]:
  """The faults in the results of the readers."""
  faults = [f"{reader}: {one[:200]}" for reader, one in results.items() if one.startswith("FAULT")]
  for reader, one in results.items():
    if not one or "\n" in one or len(one) > LETTERS or "Error" in one.partition(":")[0]:
      faults.append(f"{reader} has no one-line message: {one[:200]!r}")
  ends = {
    one if one.startswith("size ") else "refused" for r, one in results.items() if r != "header"
  }
  if len(ends) > 1:
    faults.append(f"readers disagree: {results}")
  read = next(iter(ends))
  if read.startswith("size ") and results["header"] != read:
    faults.append(f"the header's reader disagrees: {results}")
  return faults


def child(folder: Path) -> None:
  """Reads the files named on stdin; prints the results of each as JSON."""

  resource.setrlimit(resource.RLIMIT_AS, (32 * 2**30,) * 2)  # prevents swapping
  for line in sys.stdin:
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    start = time.process_time()  # independent of other processes
    results = read_all(folder / line.strip())
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    seconds = time.process_time() - start
    print(json.dumps({"results": results, "seconds": seconds, "peak": peak}), flush=True)


class Reader:
  """A subprocess that reads images; restarted after it ends."""

  def __init__(self, folder: Path):
    self._folder = folder
    self._process: subprocess.Popen | None = None

  def read(self, name: str) -> dict[str, Any] | str:
    """The results of a file, or how the process ended."""
    if self._process is None:
      command = [sys.executable, "-W", "ignore", __file__, "--child", str(self._folder)]
      self._process = subprocess.Popen(  # stderr: libtiff writes its warnings there
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
      )
    process = self._process
    process.stdin.write(f"{name}\n")
    process.stdin.flush()
    if not select.select([process.stdout], [], [], 10 * SECONDS)[0]:
      self.end()
      return f"hangs for more than {10 * SECONDS} seconds"
    if line := process.stdout.readline():
      return json.loads(line)
    with process:
      status = process.wait()
    self._process = None
    return f"the process ended with status {status}"

  def end(self) -> None:
    """Ends the process."""
    if self._process is not None:
      with self._process:  # closes the pipes
        self._process.kill()
      self._process = None


def run(count: int, seed: int, *, bombs: bool = True) -> tuple[list[str], dict[str, Any]]:
  """Reads `count` mutants; returns the faults and statistics."""
  faults, figures = [], {"read": 0, "refused": 0, "seconds": 0.0, "peak": 0}
  by_kind: Counter[str] = Counter()
  with tempfile.TemporaryDirectory() as made:
    folder = Path(made)
    reader = Reader(folder)
    try:
      for number, found in enumerate(mutants(count, seed, bombs=bombs)):
        if number % CHUNK == 0:
          reader.end()
        path = write(folder, found)
        answer = reader.read(found.name)
        path.unlink()
        if isinstance(answer, str):
          faults.append(f"{found.name}: {answer}")
          continue
        wrong = faults_of(answer["results"])
        if answer["seconds"] > SECONDS:
          wrong.append(f"took {answer['seconds']:.0f} seconds")
        if answer["peak"] > BYTES:
          wrong.append(f"took {answer['peak'] / 1e9:.2f} GB: {answer['results']}")
        faults += [f"{found.name}: {one}" for one in wrong]
        whole = answer["results"]["path"].startswith("size")
        figures["read" if whole else "refused"] += 1
        by_kind[found.name.split("-")[1].partition(".")[0]] += 1
        for key in ("seconds", "peak"):
          figures[key] = max(figures[key], answer[key])
    finally:
      reader.end()
  return faults, figures | {"kinds": dict(by_kind)}


def run_commands(seed: int) -> list[str]:
  """Faults of the commands `segment` and `batch` with some mutants."""
  faults = []
  with tempfile.TemporaryDirectory() as made:
    folder = Path(made) / "images"
    folder.mkdir()
    chosen = [m for m in mutants(400, seed) if m.data is not None][:: 400 // COMMANDS][:COMMANDS]
    for one in [*chosen, Mutant("sound.png", base_images()["png"])]:
      write(folder, one)
    files = sorted(str(path) for path in folder.iterdir())
    program = [sys.executable, "-c", "from sam3_jax.cli.main import entry; entry()"]
    for command in (
      [*program, "segment", *files, "--text", "cat", "--out", f"{made}/a"],
      [*program, "batch", "--images", str(folder), "--prompts", "cat", "--out", f"{made}/b"],
    ):
      done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
      shown = done.stdout + done.stderr
      name = command[3]
      if done.returncode not in (0, 2):
        faults.append(f"{name} ended with status {done.returncode}: {shown[-300:]}")
      if (
        "Traceback" in shown or "\x1b" in shown or not (Path(made) / "ab"[name == "batch"]).exists()
      ):
        faults.append(f"{name} printed: {shown[-1000:]!r}")
  peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
  if peak > BYTES:
    faults.append(f"a command took {peak / 1e9:.2f} GB")
  return faults


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--count", type=int, default=500)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--no-commands", action="store_true")
  parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.child:
    child(arguments.child)
    return 0
  faults, figures = run(arguments.count, arguments.seed)
  if not arguments.no_commands:
    faults += run_commands(arguments.seed)
  print(
    f"{arguments.count} mutated images, seed {arguments.seed}: {figures['read']} read, "
    f"{figures['refused']} refused, at most {figures['seconds']:.1f} s and "
    f"{figures['peak'] / 1e9:.2f} GB; kinds {figures['kinds']}"
  )
  for fault in faults:
    print(f"FAULT {fault}")
  return int(bool(faults))


if __name__ == "__main__":
  sys.exit(main())
