"""What a training run tells of its steps and evaluations, and when it must stop."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sam3_jax.training.config import TrainConfig
from sam3_jax.training.log import MetricsLog, Show
from sam3_jax.training.train_checkpoint import Storage

# Of an evaluation, that a bundle tells.
FIGURES = ("cgf1", "il_mcc", "pmf1", "click", "click_best", "three_clicks", "box")
SHOWN = 20  # images named in an error


@dataclasses.dataclass
class Scores:
  """What the evaluations gave so far.

  Attributes:
    best: the highest score, if there was any.
    figures: of the last one; those that a bundle tells, as far as they are numbers.
  """

  best: float | None = None
  figures: dict[str, float] = dataclasses.field(default_factory=dict)

  def add(self, figures: Mapping[str, Any], best: str) -> bool:
    """Takes an evaluation's figures; tells whether that called `best` is the highest so far."""
    told = {name: float(figures[name]) for name in FIGURES if name in figures}
    self.figures = {name: value for name, value in told.items() if math.isfinite(value)}
    score = float(figures[best])
    better = math.isfinite(score) and (self.best is None or score > self.best)
    # The processes go on together, even if the last digits of what each has found differ.
    better = bool(multihost_utils.broadcast_one_to_all(np.int32(better)))
    self.best = score if better else self.best
    return better


class Reporter:
  """Fetches a step's numbers while the next one runs, checks and logs them."""

  def __init__(
    self,
    config: TrainConfig,
    name: Callable[[int], str],
    storage: Storage,
    log: MetricsLog,
    show: Show,
  ):
    """Prepares for the first step.

    Args:
      config: the run.
      name: of an image by its id, for messages.
      storage: has the last good checkpoint.
      log, show: take the numbers.
    """
    self._config, self._name, self._storage = config, name, storage
    self._log, self._show = log, show
    self._pending: tuple[int, np.ndarray, dict[str, jax.Array]] | None = None
    self._began = self._last = time.perf_counter()

  def add(self, done: int, ids: np.ndarray, metrics: dict[str, jax.Array]) -> None:
    """Takes the metrics of a step that may still run; reports the one before."""
    self.finish()
    self._pending = done, ids, metrics

  def finish(self) -> None:
    """Waits for the pending step's numbers and reports them.

    Raises:
      ValueError: they are not finite.
    """
    if self._pending is None:
      return
    (done, ids, metrics), self._pending = self._pending, None
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    now = time.perf_counter()
    if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
      raise ValueError(self._fault(done, ids, values))
    seconds, self._last = now - self._last, now
    speed = self._config.data.batch / seconds
    clock = {"images_per_second": speed, "seconds": now - self._began}
    self._log.add({"step": done, **values, **clock})
    self._show(done, loss=f"loss {values['loss']:.4g}", speed=f"{speed:.3g} images/s")

  def show_best(self, best: float | None) -> None:
    if best is not None:
      self._show(best=f"best {self._config.best} {best:.1f}")
    self._last = time.perf_counter()  # an evaluation is no part of a step

  def _fault(self, done: int, ids: np.ndarray, values: dict[str, float]) -> str:
    names = [f"{i} ({self._name(i)})" for i in ids.tolist()[:SHOWN]]
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    self._storage.wait()
    latest = self._storage.latest
    kept = "none was saved" if latest is None else str(self._storage.folder / str(latest))
    return (
      f"step {done} has loss {values['loss']:g} and gradient norm {values['grad_norm']:g}; its "
      f"images: {', '.join(names)}{more}; last good checkpoint: {kept}. The step was not saved: "
      "look at these images, or lower the learning rate."
    )
