"""The training loop: steps, checkpoints to resume from, evaluations, and bundles of the result.

  OUT/config.json     the run; another one is refused
  OUT/run-data.json   identities of its data; other data are refused
  OUT/metrics.jsonl   a line a step, and one an evaluation
  OUT/steps/          checkpoints to resume from
  OUT/best/           bundle with the best evaluation so far
  OUT/final/          bundle, when all steps are done

After a kill at any moment the same call goes on from the last checkpoint, to the same parameters,
bit for bit.

Several processes (`jax.distributed`) make the same calls, on one folder that they share. The first
writes; all write their pieces of the checkpoints in `steps`, and each evaluates by itself.
"""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

from sam3_jax.checkpoint import bundle
from sam3_jax.config import Config
from sam3_jax.inference.predictor import Sam3, default_dtype
from sam3_jax.inputs.tokenizer import Tokenizer
from sam3_jax.model.layers import Layering
from sam3_jax.training import lora, run_data, state
from sam3_jax.training.batch import Batch
from sam3_jax.training.config import TrainConfig, completed, differences
from sam3_jax.training.log import MetricsLog, progress
from sam3_jax.training.optimizer import make_optimizer, make_schedule
from sam3_jax.training.report import Reporter, Scores
from sam3_jax.training.run_data import RunData
from sam3_jax.training.sharding import (
  gatherer,
  make_mesh,
  place,
  place_batch,
  replicated,
  state_shardings,
)
from sam3_jax.training.step import StepSettings, make_step
from sam3_jax.training.train_checkpoint import Storage
from sam3_jax.utils.console import Console
from sam3_jax.utils.json_text import parse
from sam3_jax.utils.os_errors import reason

CONFIG, PARTIAL = "config.json", "config.json.partial"
BEGUN = (
  PARTIAL,
  run_data.FILE,
  f"{run_data.FILE}.partial",
)  # left by a kill before CONFIG was there
PARTS = ("trunk", "text")  # whose dropout rests while nothing of them is trained
SHOWN = 20  # fields named in an error

Evaluate = Callable[[Sam3], Mapping[str, Any]]


class BatchSource(Protocol):
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
    visual: of the head for visual prompts, a tree, where it is no part of `parameters`: no concept
      trains it, so it is written as it was. None if there is none.
    identity: of the starting checkpoint; "" if there is none.
  """

  model: Config
  parameters: Mapping[str, Any]
  tokenizer: bytes
  info: Mapping[str, Any]
  unread: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  visual: Mapping[str, Any] | None = None
  identity: str = ""

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
  batches: BatchSource,
  out: Path,
  *,
  evaluate: Evaluate | None = None,
  console: Console | None = None,
  data: RunData | None = None,
) -> Path:
  """Trains, or goes on training, to the end.

  Args:
    config: the run.
    start: what it starts from.
    batches: of `config.data.batch` images in all processes together.
    out: a folder: of the same run, or empty, or to be made.
    evaluate: figures of a model; `config.best` among them, if best checkpoints are wanted.
    console: where the progress bar goes; None for no bar.
    data: what it is trained on; None for batches that depend on no files.

  Returns:
    The bundle `out/final`.

  Raises:
    ValueError: `out` holds another run, one with other data, or something else; nothing matches
      what is to be trained; the devices cannot share a batch; the processes have different runs; a
      loss or gradient is not finite: then with the step, its images and the last good checkpoint.
      That step is not saved.
  """
  values = {"config": config.to_dict(), "start": start.mark()}
  data = data or RunData()
  _check_output(out, values, data)
  final = out / "final"
  if final.exists():
    return final
  run = _begin(config, start, out, values, data)
  storage = Storage(out / "steps", config.keep)
  done, scores = _resume(run, batches, storage)
  log = MetricsLog(out / "metrics.jsonl" if _is_writer() else None, done)
  try:
    with progress(console or Console(quiet=True), config.steps, done) as show:
      reporter = Reporter(config, batches.name, storage, log, show)
      reporter.show_best(scores.best)
      while done < config.steps:
        batch, done = next(batches), done + 1
        reporter.add(done, np.asarray(batch.ids), run.step(batch))
        if evaluate is not None and _due(done, config.evaluate_every, config.steps):
          reporter.finish()
          figures = run.evaluate(evaluate)
          log.add({"step": done} | {f"evaluation/{name}": x for name, x in figures.items()})
          if scores.add(figures, config.best):
            storage.wait()
            run.write(out / "best", out.name, done, scores.figures)
          reporter.show_best(scores.best)
        if _due(done, config.save_every, config.steps):
          reporter.finish()
          kept = dataclasses.asdict(scores)
          storage.save(done, run.state, {"batches": batches.get_state(), **kept})
      reporter.finish()
    storage.wait()  # one writer at a time
    run.write(final, out.name, done, scores.figures)
  finally:
    log.close()
    storage.close()
  return final


def _begin(
  config: TrainConfig, start: Start, out: Path, values: dict[str, Any], data: RunData
) -> "_Run":
  """The run on its devices, and its folder in order; no folder is made of one that cannot begin."""
  run = _Run(config, start)
  _check_alike({**values, "data": data.digest()})
  if _is_writer():
    _write_config(out, values, data)
    _recover(out / "best")
  return run


def _resume(run: "_Run", batches: BatchSource, storage: Storage) -> tuple[int, Scores]:
  """Goes to the last checkpoint, if there is one; the steps done there, and the scores so far."""
  if storage.latest is None:
    return 0, Scores()
  run.state, saved = storage.restore(run.state)
  batches.set_state(saved["batches"])
  return storage.latest, Scores(saved["best"], saved.get("figures", {}))


def _is_writer() -> bool:
  """Whether this is the process that writes."""
  return jax.process_index() == 0


def _check_output(out: Path, values: dict[str, Any], data: RunData) -> None:
  file = out / CONFIG
  if not file.exists():
    if out.exists() and any(path.name not in BEGUN for path in out.iterdir()):
      raise ValueError(f"{out} is not empty and holds no training run; give another --out.")
    return
  try:
    before = parse(file.read_bytes(), "it")
    before = {**before, "config": completed(before["config"])}
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(f"{file} is damaged ({error}); give another --out.") from error
  if names := differences(before, values):
    named = {"start": "the starting checkpoint"}
    shown = ", ".join(named.get(one, one.removeprefix("config.")) for one in names[:SHOWN])
    raise ValueError(
      f"{out} holds a run that differs in {shown}; go on with what it was started with ({file}), "
      "or give another --out."
    )
  # The first process decides: another host's copies of the images may have other modification
  # times.
  fault = data.fault(out) if _is_writer() else ""
  if jax.process_count() > 1 and multihost_utils.process_allgather(np.array(bool(fault))).any():
    fault = fault or f"{out} holds a run that was started with other data; see the first process."
  if fault:
    raise ValueError(fault)


def _check_alike(values: dict[str, Any]) -> None:
  if jax.process_count() == 1:
    return
  digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).digest()
  every = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
  if (every != every[0]).any():
    raise ValueError(
      f"the {jax.process_count()} processes have different settings, data or checkpoints; "
      "start all with the same configuration, options and files."
    )


def _write_config(out: Path, values: dict[str, Any], data: RunData) -> None:
  try:
    out.mkdir(parents=True, exist_ok=True)
    if data != RunData():
      data.write(out)
    else:  # another run's, which was killed before it had a configuration
      (out / run_data.FILE).unlink(missing_ok=True)
    partial = out / PARTIAL
    partial.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(partial, out / CONFIG)
  except OSError as error:
    raise ValueError(f"cannot write to {out}: {reason(error)}.") from error


class _Run:
  """The model being trained on its devices."""

  def __init__(self, config: TrainConfig, start: Start):
    self._config, self._start = config, start
    dtype = default_dtype() if config.dtype == "auto" else config.dtype
    self._mesh = make_mesh(fsdp=config.fsdp)
    parts = self._mesh.size * config.accumulate
    if config.data.batch % parts:
      raise ValueError(
        f"a batch of {config.data.batch} images cannot be shared by {self._mesh.size} devices in "
        f"{config.accumulate} microbatches; make data.batch a multiple of {parts}."
      )
    initial, _ = jax.random.split(jax.random.key(config.seed))
    trained, frozen = state.split(start.parameters, config.trained, some=not config.lora.rank)
    trained |= lora.adapt(start.parameters, config.lora, initial)
    if config.objective == "visual":
      _check_visual(trained)
    optimizer = make_optimizer(config.optimizer, trained, start.model.trunk, config.steps)
    self.frozen = place(self._mesh, frozen)

    def begin(trained: state.Flat) -> state.TrainState:
      _, dropout = jax.random.split(jax.random.key(config.seed))
      return state.create(trained, optimizer, dropout, average=config.average > 0)

    # Jitted, as no device may have room for a whole state.
    placed = state_shardings(self._mesh, jax.eval_shape(begin, trained))
    self.state = jax.jit(begin, out_shardings=placed)(place(self._mesh, trained))
    computed = bundle.check_dtype(dtype)
    layering = Layering(config.remat == "full", gatherer(self._mesh, computed))
    settings = _settings(config, start.model, computed, layering, trained)
    schedule = make_schedule(config.optimizer, config.steps)
    self._step = make_step(settings, optimizer, schedule, self._mesh, self.state, self.frozen)
    self._merge = jax.jit(
      functools.partial(state.model_parameters, lora_scale=config.lora.scale),
      out_shardings=replicated(self._mesh),
    )
    self._model: Sam3 | None = None
    self._dtype = dtype

  def step(self, batch: Batch) -> dict[str, jax.Array]:
    """Trains on a batch; the metrics may not be there yet."""
    placed = place_batch(self._mesh, batch)
    self.state, metrics = self._step(self.state, self.frozen, placed)
    return metrics

  def evaluate(self, evaluate: Evaluate) -> Mapping[str, Any]:
    """Figures of the model as it is now, on this process's first device; its programs are compiled
    once."""
    if self._model is None:
      start, context = self._start, self._start.model.text.context
      tokenizer = Tokenizer(start.tokenizer, context=context)
      self._model = Sam3(start.model, {}, tokenizer, info=start.info, dtype=self._dtype)
    merged = self._merge(state.averaged(self.state), self.frozen)
    self._model.params = jax.tree.map(lambda x: x.addressable_data(0), merged)
    # No embedding outlives the evaluation, so that a digest of all parameters would be for nothing.
    self._model.identity = f"step {int(self.state.step.addressable_data(0))} of this training"
    figures = evaluate(self._model)
    self._model.params = {}  # frees the copy
    return figures

  def write(self, path: Path, name: str, done: int, figures: Mapping[str, float]) -> None:
    """A bundle of the model as it is now, in the place of another; there when this returns, in all
    processes."""
    config, start = self._config, self._start
    parameters = self._merge(state.averaged(self.state), self.frozen)
    if _is_writer():
      if start.visual is not None:
        parameters = {**parameters, bundle.VISUAL: start.visual}
      stored = jax.tree.map(lambda x: np.asarray(x).astype(config.stored), parameters)
      source = f"{start.info.get('name', config.checkpoint)}" if config.checkpoint else "random"
      info = {
        **start.info,
        "name": config.name or name,
        "trained": True,
        "source": f"{done} steps of sam3-jax train from {source} parameters",
        "licence": config.licence or start.info.get("licence", ""),
        "figures": {**self._kept_figures(), **figures},
      }
      of_start = {"info": info, "unread": start.unread}
      _replace(path, lambda new: bundle.save(new, stored, start.model, start.tokenizer, **of_start))
    multihost_utils.sync_global_devices(str(path))

  def _kept_figures(self) -> Mapping[str, float]:
    """Those of the start that are still true: of concepts, where only a visual head has learned."""
    if self._config.objective != "visual":
      return {}
    return self._start.info.get("figures", {})


def _check_visual(trained: Iterable[str]) -> None:
  """Nothing but its head may learn of visual prompts."""
  for path in trained:
    if not path.startswith(f"{bundle.VISUAL}/"):
      raise ValueError(
        f"train matches {path}, but the objective visual trains the head for visual prompts only: "
        "use a pattern such as visual/decoder/.*, or leave train out for all of it."
      )


def _settings(
  config: TrainConfig,
  model: Config,
  dtype: DTypeLike,
  layering: Layering,
  trained: Iterable[str],
) -> StepSettings:
  """The run's, of a step; `trained` are paths."""
  paths = tuple(trained)
  return StepSettings(
    model=model,
    losses=config.losses,
    dense=config.dense,
    visual=config.visual,
    objective=config.objective,
    dtype=dtype,
    duplicate=config.duplicate,
    masked=config.masked or config.data.present,
    accumulate=config.accumulate,
    average=config.average,
    lora_scale=config.lora.scale,
    layering=layering,
    frozen_parts=tuple(p for p in PARTS if not any(x.startswith(f"{p}/") for x in paths)),
  )


def _due(done: int, every: int, steps: int) -> bool:
  return done == steps or (every > 0 and done % every == 0)


def _replace(path: Path, write: Callable[[Path], None]) -> None:
  """Has `write` make a folder, or put one in its place, at one stroke but for two renamings;
  `_recover` undoes the first."""
  _recover(path)
  if not path.exists():
    write(path)
    return
  new, old = _beside(path)
  write(new)
  os.rename(path, old)
  os.rename(new, path)
  shutil.rmtree(old, ignore_errors=True)


def _recover(path: Path) -> None:
  """Puts right what a kill in `_replace` has left: the folder is back, and nothing beside it."""
  new, old = _beside(path)
  if old.exists() and not path.exists():
    os.rename(old, path)
  for leftover in (new, old):
    shutil.rmtree(leftover, ignore_errors=True)


def _beside(path: Path) -> tuple[Path, Path]:
  """What is to take a folder's place, and what was there."""
  return path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
