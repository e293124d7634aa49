"""Label Studio and X-AnyLabeling use a running server with their own code.

Label Studio's SDK is in the extra `foreign`. The two applications are installed in environments of
their own, whose programs these variables name; without a variable, its test is skipped:

    SAM3_LABEL_STUDIO   bin/label-studio of an environment with label-studio
    SAM3_XANYLABELING   bin/python of an environment with x-anylabeling-cvhub
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from label_tools import left_half

from sam3_jax.outputs.rle import encode
from sam3_jax.server.brush_rle import encode_brush
from sam3_jax.server.known_images import Instance
from sam3_jax.server.label_config import BOXES, MASKS, POLYGONS, Control, parse_label_config
from sam3_jax.server.label_results import regions

pytestmark = [pytest.mark.foreign, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[2]
SCENE = ROOT / "docs" / "scene.jpg"
POINT = (340, 150)  # on an object of the scene
COMMAND = [sys.executable, "-c", "from sam3_jax.cli.main import entry; entry()", "serve", "--quiet"]
USER, PASSWORD = "a@example.org", "secret12345"
STARTING = 900  # seconds at most; Label Studio first makes its database
CONFIG = """<View>
  <Image name="image" value="$image"/>
  <BrushLabels name="brush" toName="image"><Label value="lion"/></BrushLabels>
  <PolygonLabels name="polygon" toName="image"><Label value="hot dog"/></PolygonLabels>
  <RectangleLabels name="box" toName="image" smart="true"><Label value="tree"/></RectangleLabels>
  <KeyPointLabels name="click" toName="image" smart="true"><Label value="lion"/></KeyPointLabels>
</View>"""


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


@contextlib.contextmanager
def running(command: list[str], url: str, folder: Path, **environment: str) -> Iterator[None]:
  """A server that responds to `url` with 200."""
  requests = pytest.importorskip("requests")
  log = folder / "log.txt"
  with log.open("w") as output:
    process = subprocess.Popen(
      command, cwd=folder, env=os.environ | environment, stdout=output, stderr=output
    )
    try:
      end = time.monotonic() + STARTING
      while True:
        with contextlib.suppress(requests.RequestException):
          if requests.get(url, timeout=30).status_code == 200:
            break
        assert process.poll() is None, log.read_text()[-2000:]
        assert time.monotonic() < end, log.read_text()[-2000:]
        time.sleep(0.25)
      yield
      process.send_signal(signal.SIGTERM)
      process.wait(60)
    finally:
      process.kill()
      process.wait()


@contextlib.contextmanager
def serving(folder: Path, *options: str, **environment: str) -> Iterator[int]:
  """sam3-tiny at a port."""
  port = free_port()
  own = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment
  command = [*COMMAND, "--port", str(port), *options]
  with running(command, f"http://127.0.0.1:{port}/readyz", folder, **own):
    yield port


def converted(result: list[dict], folder: Path, kind: str) -> Path:
  """The output of the SDK's converter for an annotation with these regions."""
  converter = pytest.importorskip("label_studio_sdk.converter.converter")
  annotation = {"id": 7, "completed_by": {"email": USER}, "result": result}
  task = {"id": 1, "data": {"image": "scene.jpg"}, "annotations": [annotation]}
  (folder / "tasks.json").write_text(json.dumps([task]))
  (folder / kind).mkdir()
  made = converter.Converter(CONFIG, str(folder), download_resources=False)
  made.convert(str(folder / "tasks.json"), str(folder / kind), converter.Format[kind], is_dir=False)
  return folder / kind


def brush_masks(result: list[dict], folder: Path) -> list[np.ndarray]:
  """The masks that the SDK's converter makes of brush regions."""
  files = sorted(converted(result, folder, "BRUSH_TO_NUMPY").iterdir())
  return [np.load(path) > 0 for path in files]


class TestSdk:
  """Label Studio's SDK reads what we write."""

  @pytest.mark.parametrize("seed", range(8))
  def test_brush(self, seed):
    brush = pytest.importorskip("label_studio_sdk.converter.brush")
    rng = np.random.default_rng(seed)
    mask = rng.random((int(rng.integers(1, 90)), int(rng.integers(1, 90)))) < rng.random() ** 2
    image = brush.decode_rle(encode_brush(mask)).reshape(*mask.shape, 4)
    assert (image == np.where(mask, 255, 0)[..., None]).all()

  def test_converter(self, tmp_path):
    mask, box = left_half((480, 640)), np.array([64.0, 48, 320, 240])
    rows = [
      regions(control, label, Instance(0.5, box, encode(mask)), "image", mask.shape)
      for control, label in (
        (Control("brush", MASKS, ()), "lion"),
        (Control("polygon", POLYGONS, ()), "hot dog"),
        (Control("box", BOXES, ()), "tree"),
      )
    ]
    [brush] = brush_masks(rows[0], tmp_path)
    assert (brush == mask).all()
    content = json.loads(
      (converted(rows[1] + rows[2], tmp_path, "COCO") / "result.json").read_text()
    )
    polygon, rectangle = content["annotations"]
    assert sorted(zip(*[iter(polygon["segmentation"][0])] * 2, strict=True)) == [
      (0, 0), (0, 480), (320, 0), (320, 480)
    ]  # fmt: skip
    assert rectangle["bbox"] == pytest.approx([64, 48, 256, 192])

  def test_label_config(self):
    interface = pytest.importorskip("label_studio_sdk.label_interface").LabelInterface(CONFIG)
    config = parse_label_config(CONFIG)
    assert {control.name for control in config.controls} == {
      control.name for control in interface.controls
    }


@pytest.fixture(scope="module")
def studio(tmp_path_factory) -> Iterator[str]:
  """The URL of a Label Studio with one user."""
  program = os.environ.get("SAM3_LABEL_STUDIO")
  if not program:
    pytest.skip("SAM3_LABEL_STUDIO does not name bin/label-studio")
  folder, port = tmp_path_factory.mktemp("studio"), free_port()
  settings = {
    "ML_BLOCK_LOCAL_IP": "false", "SSRF_PROTECTION_ENABLED": "false", "SENTRY_DSN": "",
    "FRONTEND_SENTRY_DSN": "", "LATEST_VERSION_CHECK": "false", "COLLECT_ANALYTICS": "false",
    "LABEL_STUDIO_BASE_DATA_DIR": str(folder / "data"), "DJANGO_DB": "sqlite",
  }  # fmt: skip
  command = [
    program, "start", "--no-browser", "--port", str(port), "--internal-host", "127.0.0.1",
    "--data-dir", str(folder / "data"), "--username", USER, "--password", PASSWORD,
  ]  # fmt: skip
  url = f"http://127.0.0.1:{port}"
  with running(command, f"{url}/health", folder, **settings):
    yield url


def personal_token(url: str) -> str:
  """A personal access token, made as the page "Personal Access Token" does."""
  import requests

  with requests.Session() as session:
    session.get(f"{url}/user/login/")
    form = {"email": USER, "password": PASSWORD}
    form["csrfmiddlewaretoken"] = session.cookies["csrftoken"]
    session.post(f"{url}/user/login/", data=form, headers={"Referer": url})
    headers = {"X-CSRFToken": session.cookies["csrftoken"], "Referer": url}
    return session.post(f"{url}/api/token/", headers=headers).json()["token"]


def test_label_studio(studio, tmp_path, request):
  """A project made by the SDK gets predictions from the server, which the SDK's code reads."""
  import requests

  sdk, httpx = pytest.importorskip("label_studio_sdk"), pytest.importorskip("httpx")
  token, key = "a-token-of-the-server", personal_token(studio)
  http = httpx.Client(timeout=100)
  request.addfinalizer(http.close)
  client = sdk.LabelStudio(base_url=studio, api_key=key, httpx_client=http)
  project = client.projects.create(title="sam3-jax", label_config=CONFIG)
  access = requests.post(f"{studio}/api/token/refresh/", json={"refresh": key}).json()["access"]
  headers = {"Authorization": f"Bearer {access}"}
  with SCENE.open("rb") as file:
    requests.post(
      f"{studio}/api/projects/{project.id}/import", headers=headers, files={"file": file}
    ).raise_for_status()
  [task] = client.tasks.list(project=project.id)
  options = ["--label-studio-url", studio]
  with serving(tmp_path, *options, SAM3_JAX_TOKEN=token, LABEL_STUDIO_API_KEY=key) as port:
    model = client.ml.create(
      url=f"http://127.0.0.1:{port}/label-studio", project=project.id, is_interactive=True,
      auth_method="BASIC_AUTH", basic_auth_user="any", basic_auth_pass=token,
    )  # fmt: skip
    chosen = {"selectedItems": {"all": True, "excluded": []}}
    action = f"{studio}/api/dm/actions?id=retrieve_tasks_predictions&project={project.id}"
    requests.post(action, headers=headers, json=chosen).raise_for_status()
    [prediction] = client.predictions.list(task=task.id)
    x, y = POINT[0] / 6.4, POINT[1] / 4.8
    click = {
      "type": "keypointlabels", "from_name": "click", "to_name": "image", "is_positive": True,
      "value": {"x": x, "y": y, "width": 0.5, "keypointlabels": ["lion"]},
    }  # fmt: skip
    drawn = requests.post(
      f"{studio}/api/ml/{model.id}/interactive-annotating",
      headers=headers,
      json={"task": task.id, "context": {"result": [click]}},
    ).json()
  assert prediction.model_version == model.model_version
  kinds = {region["type"] for region in prediction.result}
  assert kinds == {"brushlabels", "polygonlabels"}  # there is a lion and a hot dog, and no tree
  found = prediction.result[:1] + drawn["data"]["result"][:1]
  assert [region["type"] for region in found] == ["brushlabels"] * 2
  lion, object_ = brush_masks(found, tmp_path)
  assert lion.shape == object_.shape == (480, 640)
  assert 0.001 < lion.mean() < 0.5
  assert object_[POINT[1], POINT[0]]


XANYLABELING = r"""
import json, sys
from pathlib import Path

import anylabeling.config
from PyQt6.QtGui import QImage
from PyQt6.QtWidgets import QApplication

url, key, image, folder = sys.argv[1:]
settings = Path(folder) / "config.yaml"
settings.write_text(json.dumps({"remote_server_settings": {"server_url": url, "api_key": key}}))
anylabeling.config.current_config_file = str(settings)
app = QApplication([])
from anylabeling.services.auto_labeling.remote_server import RemoteServer
from anylabeling.views.labeling.widgets.auto_labeling.auto_labeling import AutoLabelingWidget

messages = []
config = {"type": "remote_server", "name": "remote", "display_name": "Remote", "timeout": 60}
client = RemoteServer(config, messages.append)
models = client.get_available_models()
[name] = models
client.set_model_id(name)
client.set_auto_labeling_conf(0.5)
widgets = {widget["name"] for widget in models[name]["widgets"]}
found = {"unknown": sorted(widgets - set(AutoLabelingWidget.supported_remote_widgets))}
point = {"type": "point", "data": [340, 150], "label": 1}
box = {"type": "rectangle", "data": [268, 84, 414, 214], "label": 1}
for task, text, marks in [
  ("concept-polygons", "lion", []), ("concept-boxes", "lion", []), ("concept-boxes", None, [box]),
  ("object", None, [point]),
]:
  client.set_task(task)
  client.set_auto_labeling_marks(marks)
  shapes = client.predict_shapes(QImage(image), image, text_prompt=text).shapes
  found[f"{task} {text}"] = [
    [s.label, s.shape_type, s.score, [[p.x(), p.y()] for p in s.points]] for s in shapes
  ]
print(json.dumps(found | {"messages": messages}))
"""


def test_xanylabeling(tmp_path):
  """Its own client lists the model, and makes shapes of the answers."""
  program = os.environ.get("SAM3_XANYLABELING")
  if not program:
    pytest.skip("SAM3_XANYLABELING does not name bin/python")
  token = "a-token-of-the-server"
  with serving(tmp_path, SAM3_JAX_TOKEN=token) as port:
    url = f"http://127.0.0.1:{port}/anylabeling"
    done = subprocess.run(
      [program, "-c", XANYLABELING, url, token, str(SCENE), str(tmp_path)],
      env=os.environ | {"QT_QPA_PLATFORM": "offscreen"},
      capture_output=True, text=True, timeout=120,
    )  # fmt: skip
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout.strip().splitlines()[-1])
  assert found.pop("messages") == found.pop("unknown") == []
  kinds = {name: {(label, kind) for label, kind, *_ in shapes} for name, shapes in found.items()}
  assert kinds == {
    "concept-polygons lion": {("lion", "polygon")},
    "concept-boxes lion": {("lion", "rectangle")},
    "concept-boxes None": {("AUTOLABEL_OBJECT", "rectangle")},
    "object None": {("AUTOLABEL_OBJECT", "polygon")},
  }
  [[_, _, score, corners]] = found["concept-boxes lion"]
  assert score > 0.8
  assert len(corners) == 4
  polygon = found["concept-polygons lion"][0][3]
  assert len(polygon) > 10
