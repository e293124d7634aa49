"""The engine: turns, batches over images, bounds of the queue, disconnects, errors, shutdown."""

import threading
import time

import pytest

from sam3_jax.server.engine import IMAGES, PROMPTS, Engine
from sam3_jax.server.errors import ApiError


class Unit:
  """A unit with the key and the value that a test gives."""

  def __init__(self, value, key="concept"):
    self.value, self.key = value, key


class Work:
  """Records batches, and waits in each for `gate`; the value "bad" fails."""

  def __init__(self, limit: int = 1, joins: bool = True):
    self.batches, self.gate, self.began = [], threading.Event(), threading.Semaphore(0)
    self._limit, self._joins = limit, joins

  def limit(self, key):
    return self._limit

  def joins_images(self, key):
    return self._joins

  def compute(self, units):
    self.began.release()
    assert self.gate.wait(10)
    self.batches.append([unit.value for unit in units])
    if "bad" in self.batches[-1]:
      raise RuntimeError("secret details")
    return [f"{unit.value}!" for unit in units]


class Meter:
  def __init__(self):
    self.batches, self.drops = [], 0

  def batch(self, kind, size, seconds):
    self.batches.append((kind, size))

  def dropped(self):
    self.drops += 1


def started(work: Work, **options) -> Engine:
  engine = Engine(work, **options)
  engine.start()
  assert engine.wait_ready(10)
  return engine


def units(text: str, key="concept") -> list[Unit]:
  return [Unit(value, key) for value in text.split()]


def blocked(work: Work, engine: Engine):
  """Submits a unit that the engine computes until `work.gate` is set."""
  future = engine.submit(PROMPTS, units("first"))
  assert work.began.acquire(timeout=10)
  return future


def test_says_ready_only_when_work_is_accepted():
  told, engine = threading.Event(), Engine(Work())
  seen = []

  def ready():
    seen.append(engine.is_ready)
    told.set()

  engine.start(lambda: seen.append(engine.is_ready), ready=ready)
  assert told.wait(10)
  assert seen == [False, True]
  engine.stop()


def test_results_are_in_order_of_the_units():
  work = Work(limit=2)
  work.gate.set()
  engine = started(work)
  mixed = [Unit("a", "x"), Unit("b", "y"), Unit("c", "x"), Unit("d", "y"), Unit("e", "x")]
  done = engine.submit(PROMPTS, mixed).result(10)
  assert done.values == ["a!", "b!", "c!", "d!", "e!"]
  assert work.batches == [["a", "c"], ["e"], ["b", "d"]]
  engine.stop()


def test_batches_requests_of_several_clients():
  work, meter = Work(limit=4), Meter()
  engine = started(work, meter=meter)
  blocked(work, engine)
  futures = [engine.submit(PROMPTS, units(text)) for text in ("a b", "c", "d e f")]
  other = engine.submit(PROMPTS, units("x", "visual"))
  work.gate.set()
  assert [future.result(10).values for future in futures] == [
    ["a!", "b!"], ["c!"], ["d!", "e!", "f!"],
  ]  # fmt: skip
  assert other.result(10).values == ["x!"]
  assert work.batches == [["first"], ["a", "b", "c", "d"], ["x"], ["e", "f"]]
  assert meter.batches == [("prompts", 1), ("prompts", 4), ("prompts", 1), ("prompts", 2)]
  engine.stop()


def test_large_requests_take_turns_with_small_ones():
  work = Work(limit=1, joins=False)
  engine = started(work)
  blocked(work, engine)
  large, small = engine.submit(PROMPTS, units("a b c d")), engine.submit(PROMPTS, units("x"))
  work.gate.set()
  large.result(10)
  small.result(10)
  assert [value for batch in work.batches for value in batch] == ["first", "a", "x", "b", "c", "d"]
  engine.stop()


def test_refuses_more_than_the_bound():
  work = Work()
  engine = started(work, max_prompts=3, max_images=1)
  blocked(work, engine)
  engine.submit(PROMPTS, units("a b"))
  engine.submit(IMAGES, units("image", "image"))
  for kind, text in ((PROMPTS, "c d"), (IMAGES, "image")):
    with pytest.raises(ApiError, match="waiting") as caught:
      engine.submit(kind, units(text))
    assert (caught.value.status_code, caught.value.code) == (429, "busy")
    assert int(caught.value.headers["Retry-After"]) >= 1
  engine.submit(PROMPTS, units("c"))
  assert engine.waiting(PROMPTS) == 3
  work.gate.set()
  engine.stop()
  assert engine.waiting(PROMPTS) == engine.waiting(IMAGES) == 0


def test_drops_the_work_of_a_client_that_disconnected():
  work, meter = Work(), Meter()
  engine = started(work, meter=meter)
  blocked(work, engine)
  gone, kept = engine.submit(PROMPTS, units("a b c")), engine.submit(PROMPTS, units("x"))
  assert gone.cancel()
  work.gate.set()
  assert kept.result(10).values == ["x!"]
  engine.stop()
  assert [value for batch in work.batches for value in batch] == ["first", "x"]
  assert (meter.drops, engine.waiting(PROMPTS)) == (1, 0)


def test_a_fault_fails_only_its_own_request():
  work, logged = Work(limit=4), []
  engine = started(work, log=logged.append)
  blocked(work, engine)
  futures = [engine.submit(PROMPTS, units(text)) for text in ("a", "bad more", "c")]
  work.gate.set()
  assert futures[0].result(10).values == ["a!"]
  assert futures[2].result(10).values == ["c!"]
  with pytest.raises(ApiError) as caught:
    futures[1].result(10)
  assert caught.value.code == "internal"
  assert "secret" not in caught.value.detail
  assert [str(error) for error in logged] == ["secret details"]
  assert engine.submit(PROMPTS, units("after")).result(10).values == ["after!"]
  engine.stop()


def test_stop_finishes_what_waits_and_refuses_more():
  work = Work()
  engine = started(work)
  futures = [blocked(work, engine), engine.submit(PROMPTS, units("a b"))]
  stopping = threading.Thread(target=engine.stop)
  stopping.start()
  while engine.is_ready:
    time.sleep(0.01)
  with pytest.raises(ApiError) as caught:
    engine.submit(PROMPTS, units("late"))
  assert caught.value.code == "not_ready"
  work.gate.set()
  stopping.join(10)
  assert [future.result(0).values for future in futures] == [["first!"], ["a!", "b!"]]


def test_a_failure_to_compile_is_kept():
  engine, logged = Engine(Work(), log=lambda error: logged.append(error)), []

  def prepare():
    raise RuntimeError("no memory")

  engine.start(prepare, failed=lambda: logged.append("failed"))
  assert not engine.wait_ready(0.2)
  assert str(engine.error) == "no memory"
  assert [str(one) for one in logged] == ["no memory", "failed"]
