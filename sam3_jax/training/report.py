"""Reports of steps and evaluations, and the check for losses that are not finite."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sam3_jax.training.config import VIDEO_METRICS, VISUAL_METRICS, TrainConfig
from sam3_jax.training.log import MetricsLog, Show
from sam3_jax.training.train_checkpoint import TrainCheckpoints

# Metrics of an evaluation that a bundle's description has.
BUNDLE_METRICS = ("cgf1", "il_mcc", "pmf1", *VISUAL_METRICS, *VIDEO_METRICS)
MAX_IMAGES = 20  # images named in an error message


@dataclasses.dataclass
class BestMetric:
  """The best evaluation so far, and the latest one.

  Attributes:
    value: the highest value of the selected metric; None before the first evaluation.
    metrics: finite metrics of the latest evaluation, for a bundle's description.
  """

  value: float | None = None
  metrics: dict[str, float] = dataclasses.field(default_factory=dict)

  def add(self, metrics: Mapping[str, Any], name: str) -> bool:
    """Adds an evaluation; returns whether its metric `name` is the highest so far."""
    values = {metric: float(metrics[metric]) for metric in BUNDLE_METRICS if metric in metrics}
    self.metrics = {metric: value for metric, value in values.items() if math.isfinite(value)}
    value = float(metrics[name])
    better = math.isfinite(value) and (self.value is None or value > self.value)
    # The first process decides, because the last digits may differ between processes.
    better = bool(multihost_utils.broadcast_one_to_all(np.int32(better)))
    self.value = value if better else self.value
    return better


class Reporter:
  """Fetches the metrics of a step while the next one runs, checks and logs them."""

  def __init__(
    self,
    config: TrainConfig,
    name: Callable[[int], str],
    checkpoints: TrainCheckpoints,
    log: MetricsLog,
    show: Show,
  ):
    """Prepares for the first step.

    Args:
      config: the run.
      name: returns the name of an image, given its id.
      checkpoints: for the path of the last good checkpoint.
      log, show: receive the metrics.
    """
    self._config, self._name, self._checkpoints = config, name, checkpoints
    self._log, self._show = log, show
    self._pending: tuple[int, np.ndarray, dict[str, jax.Array]] | None = None
    self._began = self._last = time.perf_counter()

  def add(self, done: int, ids: np.ndarray, metrics: dict[str, jax.Array]) -> None:
    """Adds the metrics of a step that may still run; reports the step before it."""
    self.finish()
    self._pending = done, ids, metrics

  def finish(self) -> None:
    """Waits for the metrics of the pending step, and reports them.

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
    speed, what = self._config.batch_size / seconds, "clips" if self._config.clips else "images"
    times = {f"{what}_per_second": speed, "seconds": now - self._began}
    self._log.add({"step": done, **values, **times})
    self._show(done, loss=f"loss {values['loss']:.4g}", speed=f"{speed:.3g} {what}/s")

  def show_best(self, best: float | None) -> None:
    """Shows the best metric after an evaluation, whose time is not part of a step."""
    if best is not None:
      self._show(best=f"best {self._config.best_metric} {best:.1f}")
    self._last = time.perf_counter()

  def _fault(self, done: int, ids: np.ndarray, values: dict[str, float]) -> str:
    names = [f"{i} ({self._name(i)})" for i in ids.tolist()[:MAX_IMAGES]]
    more = f" and {len(ids) - MAX_IMAGES} more" if len(ids) > MAX_IMAGES else ""
    self._checkpoints.wait()
    latest = self._checkpoints.latest
    good = "none was saved" if latest is None else str(self._checkpoints.directory / str(latest))
    return (
      f"step {done} has loss {values['loss']:g} and gradient norm {values['grad_norm']:g}; its "
      f"images: {', '.join(names)}{more}; last good checkpoint: {good}. The step was not saved: "
      "check these images, or lower the learning rate."
    )
