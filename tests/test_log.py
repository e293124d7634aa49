"""The metrics file of training, and its plot."""

import json
import sys

import pytest

from sam3_jax.evaluation import cgf1
from sam3_jax.training import log, report


def test_metrics_of_repeated_steps_are_removed(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n{"step": 3, "loss": 1}\n{"st')
  file = log.MetricsLog(path, done=2)
  file.add({"step": 3, "loss": 0.123456789})
  file.close()
  assert [json.loads(line) for line in path.read_text().splitlines()] == [
    {"step": 1, "loss": 2}, {"step": 2, "loss": 1}, {"step": 3, "loss": 0.123457},
  ]  # fmt: skip


def test_plot_without_matplotlib(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  with pytest.raises(ImportError, match=r"pip install 'sam3-jax\[plots\]'"):
    log.check_plot(tmp_path / "plot.png")


@pytest.mark.parametrize("name", ["plot", "plot.foo", "plot.png.gz", "folder.png"])
def test_invalid_plot_files_are_refused(tmp_path, name):
  (tmp_path / "folder.png").mkdir()
  with pytest.raises(
    ValueError, match=r"must be a file that ends in \.png or \.svg; got "
  ) as caught:
    log.check_plot(tmp_path / name)
  assert str(tmp_path / name) in str(caught.value)
  assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_plot_makes_its_directory(tmp_path):
  image = tmp_path / "a" / "b" / "plot.svg"
  log.check_plot(image)
  assert not image.parent.exists()
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n')
  log.plot(tmp_path / "metrics.jsonl", image, [])
  assert b"<svg" in image.read_bytes()
  assert [path.name for path in image.parent.iterdir()] == ["plot.svg"]


def test_plot_of_the_given_metrics(monkeypatch, tmp_path):
  from matplotlib.figure import Figure

  drawn, save = [], Figure.savefig
  monkeypatch.setattr(
    Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k)
  )
  figures = cgf1.MetricSums().metrics()
  assert len(figures) > 20
  lines = [{"step": i, "loss": 1 / i, "grad_norm": i, "learning_rate": 1.0} for i in range(1, 5)]
  lines.append({"step": 4} | {f"evaluation/{name}": x for name, x in figures.items()})
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  wanted = [*report.BUNDLE_METRICS, "f1_50", "cgf1", "unknown"]
  log.plot(tmp_path / "metrics.jsonl", tmp_path / "plot.png", wanted)
  assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
  names = ["loss", "grad_norm", "learning_rate", "cgf1", "il_mcc", "pmf1", "f1_50"]
  assert [axes.get_ylabel() for axes in drawn[0].axes] == names
