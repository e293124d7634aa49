"""Prometheus metrics, in a registry of their own."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64)
METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH")


class Metrics:
  """What the server counts. Labels have few values, none of which a client chooses."""

  content_type = CONTENT_TYPE_LATEST

  def __init__(self):
    self.registry = CollectorRegistry()
    self._requests = self._new(
      Counter, "requests", "Requests by route and status.", ("method", "route", "status")
    )
    self._latency = self._new(
      Histogram, "request_seconds", "Time of a request.", ("route",), buckets=_SECONDS
    )
    self._batches = self._new(
      Histogram, "batch_size", "Images or prompts of a batch.", ("kind",), buckets=_SIZES
    )
    self._device = self._new(
      Histogram, "device_seconds", "Time of a batch on the device.", ("kind",), buckets=_SECONDS
    )
    self._done = self._new(
      Counter, "device_units", "Images encoded and prompts decoded.", ("kind",)
    )
    self._dropped = self._new(Counter, "dropped", "Work dropped because its client disconnected.")

  def _new(self, kind, name: str, text: str, labels: tuple[str, ...] = (), **options):
    return kind(name, text, labels, namespace="sam3", registry=self.registry, **options)

  def request(self, method: str, route: str, status: int, seconds: float) -> None:
    method = method if method in METHODS else "other"
    self._requests.labels(method, route, str(status)).inc()
    self._latency.labels(route).observe(seconds)

  def batch(self, kind: str, size: int, seconds: float) -> None:
    self._batches.labels(kind).observe(size)
    self._device.labels(kind).observe(seconds)
    self._done.labels(kind).inc(size)

  def dropped(self) -> None:
    self._dropped.inc()

  def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
    """Adds a gauge whose value is read when the metrics are."""
    self._new(Gauge, name, text).set_function(read)

  def text(self) -> bytes:
    return generate_latest(self.registry)
