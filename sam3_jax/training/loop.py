"""The training loop: steps, checkpoints to resume from, evaluations, and bundles of the result.

After a kill at any time, the same call resumes from the latest checkpoint, and ends with the same
parameters, bit for bit. `run_directory` lists the files of a run.

Several processes (`jax.distributed`) make the same calls, on one directory that they share. The
first process writes. Every process writes its shards of the checkpoints, and evaluates by itself.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from sam3_jax.training.batch import Batch
from sam3_jax.training.config import TrainConfig
from sam3_jax.training.log import MetricsLog, progress
from sam3_jax.training.report import BestMetric, Reporter
from sam3_jax.training.run_data import RunData
from sam3_jax.training.run_directory import (
  check_output,
  is_writer,
  recover,
  run_values,
  write_config,
)
from sam3_jax.training.start import Start
from sam3_jax.training.train_checkpoint import TrainCheckpoints
from sam3_jax.training.trainer import Evaluate, Trainer
from sam3_jax.training.video_examples import ClipBatch
from sam3_jax.utils.console import Console


class BatchSource(Protocol):
  """An endless sequence of batches, such as `data.Batches`."""

  def __next__(self) -> Batch | ClipBatch: ...
  def get_state(self) -> dict[str, Any]: ...
  def set_state(self, state: dict[str, Any], /) -> None: ...
  def name(self, index: int, /) -> str: ...


def train(
  config: TrainConfig,
  start: Start,
  batches: BatchSource,
  out: Path,
  *,
  evaluate: Evaluate | None = None,
  console: Console | None = None,
  data: RunData | None = None,
) -> Path:
  """Trains, or resumes training, to the end.

  Args:
    config: the run.
    start: parameters to start from.
    batches: of `config.batch_size` images or clips over all processes.
    out: output directory: new, empty, or of the same run.
    evaluate: returns metrics of a model, among them `config.best_metric`.
    console: shows a progress bar; None for no bar.
    data: identities of the training data; None for batches that depend on no files.

  Returns:
    The bundle `out/final`.

  Raises:
    ValueError: `out` has another run, a run with other data, or other files; no parameter is
      trainable; devices or processes do not fit; or a loss or gradient is not finite. Then the
      message has the step, its images and the last good checkpoint; the step is not saved.
  """
  values, data = run_values(config.to_dict(), start.checksum()), data or RunData()
  check_output(out, values, data)
  final = out / "final"
  if final.exists():
    return final
  trainer = Trainer(config, start)
  _begin(out, values, data)
  checkpoints = TrainCheckpoints(out / "steps", config.max_to_keep)
  done, best = _resume(trainer, batches, checkpoints)
  log = MetricsLog(out / "metrics.jsonl" if is_writer() else None, done)
  try:
    with progress(console or Console(quiet=True), config.steps, done) as show:
      reporter = Reporter(config, batches.name, checkpoints, log, show)
      run = _Run(config, out, trainer, batches, checkpoints, log, reporter, best)
      run.train(done, evaluate)
    checkpoints.wait()  # one writer at a time
    trainer.write(final, out.name, config.steps, best.metrics)
  finally:
    log.close()
    checkpoints.close()
  return final


@dataclasses.dataclass
class _Run:
  """The parts of a run that has begun."""

  config: TrainConfig
  out: Path
  trainer: Trainer
  batches: BatchSource
  checkpoints: TrainCheckpoints
  log: MetricsLog
  reporter: Reporter
  best: BestMetric

  def train(self, done: int, evaluate: Evaluate | None) -> None:
    """Trains the steps after `done`."""
    config = self.config
    self.reporter.show_best(self.best.value)
    while done < config.steps:
      batch, done = next(self.batches), done + 1
      self.reporter.add(done, np.asarray(batch.ids), self.trainer.step(batch))
      if evaluate is not None and _is_due(done, config.evaluate_every, config.steps):
        self._evaluate(done, evaluate)
      if _is_due(done, config.save_every, config.steps):
        self.reporter.finish()
        position = {"batches": self.batches.get_state(), **dataclasses.asdict(self.best)}
        self.checkpoints.save(done, self.trainer.state, position)
    self.reporter.finish()

  def _evaluate(self, done: int, evaluate: Evaluate) -> None:
    """Evaluates the model, and saves it if it is the best so far."""
    self.reporter.finish()
    metrics = self.trainer.evaluate(evaluate)
    self.log.add({"step": done} | {f"evaluation/{name}": x for name, x in metrics.items()})
    if self.best.add(metrics, self.config.best_metric):
      self.checkpoints.wait()
      self.trainer.write(self.out / "best", self.out.name, done, self.best.metrics)
    self.reporter.show_best(self.best.value)


def _begin(out: Path, values: dict[str, Any], data: RunData) -> None:
  """Prepares the output directory, once it is certain that the run can begin."""
  _check_same_run({**values, "data": data.digest()})
  if is_writer():
    write_config(out, values, data)
    recover(out / "best")


def _resume(
  trainer: Trainer, batches: BatchSource, checkpoints: TrainCheckpoints
) -> tuple[int, BestMetric]:
  """Restores the latest checkpoint, if any; returns its number of steps and the best metric."""
  if checkpoints.latest is None:
    return 0, BestMetric()
  trainer.state, saved = checkpoints.restore(trainer.state)
  batches.set_state(saved["batches"])
  return checkpoints.latest, BestMetric(saved["value"], saved["metrics"])


def _check_same_run(values: dict[str, Any]) -> None:
  """Raises ValueError if the processes have different settings."""
  if jax.process_count() == 1:
    return
  digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).digest()
  digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
  if (digests != digests[0]).any():
    raise ValueError(
      f"the {jax.process_count()} processes have different settings, data or checkpoints; start "
      "all of them with the same configuration, options and files."
    )


def _is_due(done: int, every: int, steps: int) -> bool:
  return done == steps or (every > 0 and done % every == 0)
