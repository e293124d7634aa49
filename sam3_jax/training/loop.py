"""The training loop: steps, checkpoints to resume from, evaluations, and bundles of the result.

  OUT/config.json     the run; another one is refused
  OUT/metrics.jsonl   a line a step, and one an evaluation
  OUT/steps/          checkpoints to resume from
  OUT/best/           bundle with the best evaluation so far
  OUT/final/          bundle, when all steps are done

After a kill at any moment the same call goes on from the last checkpoint, to the same parameters,
bit for bit.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from rich.console import Console

from sam3_jax import checkpoint
from sam3_jax.config import Config
from sam3_jax.inference import Sam3, default_dtype
from sam3_jax.model.layers import Layering
from sam3_jax.tokenizer import Tokenizer
from sam3_jax.training import lora, state
from sam3_jax.training.batch import Batch
from sam3_jax.training.config import TrainConfig, differences
from sam3_jax.training.log import MetricsLog, Show, progress
from sam3_jax.training.optimizer import make_optimizer, make_schedule
from sam3_jax.training.sharding import gatherer, make_mesh, place_batch, state_shardings, whole
from sam3_jax.training.step import StepSettings, make_step
from sam3_jax.training.storage import Storage

CONFIG, PARTIAL = "config.json", "config.json.partial"
PARTS = ("trunk", "text")  # whose dropout rests while nothing of them is trained
FIGURES = ("cgf1", "il_mcc", "pmf1")  # of an evaluation, that a bundle tells
SHOWN = 20  # pictures, or fields, named in an error

Evaluate = Callable[[Sam3], Mapping[str, Any]]


class Source(Protocol):
  """Batches without end, such as `data.Batches`."""

  def __next__(self) -> Batch: ...
  def get_state(self) -> dict[str, Any]: ...
  def set_state(self, state: dict[str, Any], /) -> None: ...
  def name(self, index: int, /) -> str: ...


@dataclasses.dataclass(frozen=True)
class Start:
  """What training starts from.

  Attributes:
    model: sizes.
    parameters: of the model, by path.
    tokenizer: bytes of the SentencePiece model.
    info: what the starting checkpoint says of itself.
    unread: what it keeps besides, for the way back to other programs.
  """

  model: Config
  parameters: Mapping[str, Any]
  tokenizer: bytes
  info: Mapping[str, Any]
  unread: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def mark(self) -> str:
    """Tells starts apart: a checksum of what a resumed run must find again."""
    digest = hashlib.sha256(json.dumps(self.model.to_dict(), sort_keys=True).encode())
    digest.update(self.tokenizer)
    for path, array in sorted(self.parameters.items()):
      digest.update(path.encode())
      digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()[:16]


def train(
  config: TrainConfig,
  start: Start,
  batches: Source,
  out: Path,
  *,
  evaluate: Evaluate | None = None,
  console: Console | None = None,
) -> Path:
  """Trains, or goes on training, to the end.

  Args:
    config: the run.
    start: what it starts from.
    batches: of `config.data.batch` pictures in all processes together.
    out: a folder: of the same run, or empty, or to be made.
    evaluate: figures of a model; `config.best` among them, if best checkpoints are wanted.
    console: where the progress bar goes; None for no bar.

  Returns:
    The bundle `out/final`.

  Raises:
    ValueError: `out` holds another run, or something else; nothing matches what is to be trained;
      the devices cannot share a batch; a loss or gradient is not finite: then with the step, its
      pictures and the last good checkpoint. That step is not saved.
  """
  values = {"config": config.to_dict(), "start": start.mark()}
  _check_output(out, values)
  final = out / "final"
  if final.exists():
    return final
  run = _Run(config, start)
  _write_config(out, values)
  storage = Storage(out / "steps", config.keep)
  done, best = 0, None
  if storage.latest is not None:
    done = storage.latest
    run.state, saved = storage.restore(run.state)
    batches.set_state(saved["batches"])
    best = saved["best"]
  log = MetricsLog(out / "metrics.jsonl", done)
  try:
    with progress(console or Console(quiet=True), config.steps, done) as show:
      reporter = _Reporter(config, batches, storage, log, show)
      reporter.show_best(best)
      while done < config.steps:
        batch = next(batches)
        metrics = run.step(batch)
        done += 1
        reporter.add(done, np.asarray(batch.ids), metrics)
        if evaluate is not None and _due(done, config.evaluate_every, config.steps):
          reporter.finish()
          figures = run.evaluate(evaluate)
          log.add({"step": done} | {f"evaluation/{name}": x for name, x in figures.items()})
          score = float(figures[config.best])
          if math.isfinite(score) and (best is None or score > best):
            best = score
            _replace(
              out / "best", functools.partial(run.write, name=out.name, done=done, figures=figures)
            )
          reporter.show_best(best)
        if _due(done, config.save_every, config.steps):
          reporter.finish()
          storage.save(done, run.state, {"batches": batches.get_state(), "best": best})
      reporter.finish()
    run.write(final, out.name, done, {})
  finally:
    log.close()
    storage.close()
  return final


def _check_output(out: Path, values: dict[str, Any]) -> None:
  file = out / CONFIG
  if not file.exists():
    if out.exists() and any(path.name != PARTIAL for path in out.iterdir()):
      raise ValueError(f"{out} is not empty and holds no training run; give another --out.")
    return
  try:
    before = json.loads(file.read_bytes())
  except ValueError as error:
    raise ValueError(f"{file} is damaged ({error}); give another --out.") from error
  if names := differences(before, values):
    shown = ", ".join(name.removeprefix("config.") for name in names[:SHOWN])
    raise ValueError(
      f"{out} holds a run that differs in {shown}; go on with what it was started with ({file}), "
      "or give another --out."
    )


def _write_config(out: Path, values: dict[str, Any]) -> None:
  try:
    out.mkdir(parents=True, exist_ok=True)
    partial = out / PARTIAL
    partial.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(partial, out / CONFIG)
  except OSError as error:
    raise ValueError(f"cannot write to {out}: {error.strerror}.") from error


class _Run:
  """The model being trained on its devices."""

  def __init__(self, config: TrainConfig, start: Start):
    self._config, self._start = config, start
    dtype = default_dtype() if config.dtype == "auto" else config.dtype
    self._mesh = make_mesh(fsdp=config.fsdp)
    parts = self._mesh.size * config.accumulate
    if config.data.batch % parts:
      raise ValueError(
        f"a batch of {config.data.batch} pictures cannot be shared by {self._mesh.size} devices in "
        f"{config.accumulate} microbatches; make data.batch a multiple of {parts}."
      )
    initial, dropout = jax.random.split(jax.random.key(config.seed))
    trained, frozen = state.split(start.parameters, config.trained, some=not config.lora.rank)
    trained |= lora.adapt(start.parameters, config.lora, initial)
    optimizer = make_optimizer(config.optimizer, trained, start.model.trunk, config.steps)
    self.frozen = jax.device_put(frozen, state_shardings(self._mesh, frozen))
    self.state = state.create(trained, optimizer, dropout, average=config.average > 0)
    self.state = jax.device_put(self.state, state_shardings(self._mesh, self.state))
    settings = StepSettings(
      model=start.model,
      losses=config.losses,
      objective=config.objective,
      dtype=checkpoint.check_dtype(dtype),
      duplicate=config.duplicate,
      masked=config.data.masked,
      accumulate=config.accumulate,
      average=config.average,
      lora_scale=config.lora.scale,
      layering=Layering(
        config.remat == "full", gatherer(self._mesh, checkpoint.check_dtype(dtype))
      ),
      frozen_parts=tuple(p for p in PARTS if not any(x.startswith(f"{p}/") for x in trained)),
    )
    schedule = make_schedule(config.optimizer, config.steps)
    self._step = make_step(settings, optimizer, schedule, self._mesh, self.state, self.frozen)
    self._merge = jax.jit(
      functools.partial(state.model_parameters, lora_scale=config.lora.scale),
      out_shardings=whole(self._mesh),
    )
    self._model: Sam3 | None = None
    self._dtype = dtype

  def step(self, batch: Batch) -> dict[str, jax.Array]:
    """Trains on a batch; the metrics may not be there yet."""
    placed = place_batch(self._mesh, batch)
    self.state, metrics = self._step(self.state, self.frozen, placed)
    return metrics

  def evaluate(self, evaluate: Evaluate) -> Mapping[str, Any]:
    """Figures of the model as it is now; its programs are compiled once."""
    if self._model is None:
      start, context = self._start, self._start.model.text.context
      tokenizer = Tokenizer(start.tokenizer, context=context)
      self._model = Sam3(start.model, {}, tokenizer, info=start.info, dtype=self._dtype)
    self._model.params = self._merge(state.averaged(self.state), self.frozen)
    figures = evaluate(self._model)
    self._model.params = {}  # frees the copy
    return figures

  def write(self, path: Path, name: str, done: int, figures: Mapping[str, Any]) -> None:
    """A bundle of the model as it is now."""
    config, start = self._config, self._start
    parameters = self._merge(state.averaged(self.state), self.frozen)
    if jax.process_index():
      return
    stored = jax.tree.map(lambda x: np.asarray(x).astype(config.stored), parameters)
    source = f"{start.info.get('name', config.checkpoint)}" if config.checkpoint else "random"
    info = {
      **start.info,
      "name": config.name or name,
      "trained": True,
      "source": f"{done} steps of sam3-jax train from {source} parameters",
      "licence": config.licence or start.info.get("licence", ""),
      "figures": {key: figures[key] for key in FIGURES if key in figures},
    }
    checkpoint.save(path, stored, start.model, start.tokenizer, info=info, unread=start.unread)


class _Reporter:
  """Fetches a step's numbers while the next one runs, checks and logs them."""

  def __init__(
    self, config: TrainConfig, batches: Source, storage: Storage, log: MetricsLog, show: Show
  ):
    self._config, self._batches, self._storage = config, batches, storage
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
    names = [f"{i} ({self._batches.name(i)})" for i in ids.tolist()[:SHOWN]]
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    self._storage.wait()
    latest = self._storage.latest
    kept = "none was saved" if latest is None else str(self._storage.folder / str(latest))
    return (
      f"step {done} has loss {values['loss']:g} and gradient norm {values['grad_norm']:g}; its "
      f"pictures: {', '.join(names)}{more}; last good checkpoint: {kept}. The step was not saved: "
      "look at these pictures, or lower the learning rate."
    )


def _due(done: int, every: int, steps: int) -> bool:
  return done == steps or (every > 0 and done % every == 0)


def _replace(path: Path, write: Callable[[Path], None]) -> None:
  """Puts what `write` makes in the place of a folder, at one stroke but for two renamings."""
  new, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
  for leftover in (new, old):
    shutil.rmtree(leftover, ignore_errors=True)
  write(new)
  if path.exists():
    os.rename(path, old)
  os.rename(new, path)
  shutil.rmtree(old, ignore_errors=True)
