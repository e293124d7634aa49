"""Output of training: metrics as JSON lines, a progress bar, a plot."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeRemainingColumn

from sam3_jax.utils.atomic_files import Draft, write_bytes
from sam3_jax.utils.console import Console, live

PLOTS = (".png", ".svg")


class MetricsLog:
  """A file with one JSON object per line, each with `step`, the number of completed steps.

  A resumed run removes the lines of steps that it repeats, and a line that a kill truncated.
  """

  def __init__(self, path: Path | None, done: int):
    """Opens the file.

    Args:
      path: the file; None for no file, as in all processes but the first.
      done: number of completed steps, whose lines are kept.
    """
    self._file = None
    if path is None:
      return
    kept = [line for line in read_metrics(path) if line["step"] <= done] if path.exists() else []
    write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    self._file = path.open("a")

  def add(self, values: Mapping[str, Any]) -> None:
    """Writes one line, with six significant digits, and flushes it."""
    if self._file is None:
      return
    rounded = {
      name: float(f"{value:.6g}") if isinstance(value, float) else value
      for name, value in values.items()
    }
    self._file.write(json.dumps(rounded) + "\n")
    self._file.flush()

  def close(self) -> None:
    if self._file is not None:
      self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
  """Reads the complete lines of a metrics file."""
  lines = []
  for line in path.read_text().splitlines():
    with contextlib.suppress(ValueError):
      value = json.loads(line)
      if isinstance(value, dict) and "step" in value:
        lines.append(value)
  return lines


class Show(Protocol):
  """Updates the progress bar."""

  def __call__(self, done: int | None = None, **figures: str) -> None:
    """Shows the number of completed steps, and the figures `loss`, `best` and `speed`."""


@contextlib.contextmanager
def progress(console: Console, steps: int, first: int) -> Iterator[Show]:
  """A progress bar with the loss, the best metric, images per second and the remaining time."""
  names = ("loss", "best", "speed")
  columns = (
    SpinnerColumn(),
    TextColumn("step {task.completed}/{task.total}"),
    BarColumn(),
    *(TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in names),
    TimeRemainingColumn(),
  )
  empty = dict.fromkeys(names, "")
  with live(console, *columns, total=steps, completed=first, **empty) as update:
    yield lambda done=None, **figures: update(completed=done, **figures)


def check_plot(file: Path) -> None:
  """Checks that `plot` can draw a file.

  Raises:
    ImportError: matplotlib is not installed.
    ValueError: the file is not a PNG or SVG.
  """
  require_matplotlib()
  if file.suffix not in PLOTS or file.is_dir():
    raise ValueError(f"--plot must be a file that ends in {' or '.join(PLOTS)}; got {file}.")


def require_matplotlib() -> None:
  """Raises ImportError with the remedy if matplotlib is not installed."""
  try:
    import matplotlib  # noqa: F401  # pyright: ignore[reportMissingImports]
  except ImportError as error:
    raise ImportError("--plot needs matplotlib: pip install 'sam3-jax[plots]'.") from error


def plot(metrics: Path, file: Path, figures: Sequence[str]) -> None:
  """Draws loss, gradient norm, learning rate and evaluation metrics over the steps.

  Args:
    metrics: the metrics file; metrics that it does not have are left out.
    file: the plot; see `check_plot`.
    figures: names of evaluation metrics.
  """
  from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

  lines = read_metrics(metrics)
  evaluated = [f"evaluation/{name}" for name in dict.fromkeys(figures)]
  wanted = ["loss", "grad_norm", "learning_rate", *evaluated]
  panels = [name for name in wanted if any(name in line for line in lines)]
  figure = Figure(figsize=(8, 2.2 * max(1, len(panels))), layout="constrained")
  for number, name in enumerate(panels, start=1):
    axes = figure.add_subplot(len(panels), 1, number)
    points = [(line["step"], line[name]) for line in lines if name in line]
    points = [(x, y) for x, y in points if isinstance(y, int | float) and math.isfinite(y)]
    axes.plot(*zip(*points, strict=True), marker="." if len(points) < 40 else "", linewidth=1)
    axes.set_ylabel(name.removeprefix("evaluation/"))
    axes.set_yscale("log" if name in ("loss", "grad_norm") else "linear")
  figure.supxlabel("step")
  with Draft(file) as draft:
    figure.savefig(draft.file, format=file.suffix.lstrip("."), dpi=120)
    draft.commit()
