"""Label Studio's protocol, with requests as Label Studio 1.23 sends them."""

import base64
import io

import numpy as np
import pytest
from label_tools import HEIGHT, WIDTH, client, left_half
from PIL import Image
from test_brush_rle import decoded

from sam3_jax.server import label_studio, settings
from sam3_jax.server.errors import ApiError

CONFIG = """<View>
  <Image name="photo" value="$image"/>
  <BrushLabels name="brush" toName="photo"><Label value="lion"/><Label value="cat"/></BrushLabels>
  <PolygonLabels name="polygon" toName="photo"><Label value="tree"/></PolygonLabels>
  <RectangleLabels name="box" toName="photo" smart="true" model_score_threshold="0.2">
    <Label value="lion"/><Label value="dog"/>
  </RectangleLabels>
  <KeyPointLabels name="click" toName="photo" smart="true"><Label value="cat"/></KeyPointLabels>
</View>"""


def png(width: int = WIDTH, height: int = HEIGHT, color: str = "red") -> bytes:
  buffer = io.BytesIO()
  Image.new("RGB", (width, height), color).save(buffer, "PNG")
  return buffer.getvalue()


def data_uri(data: bytes) -> str:
  return f"data:image/png;base64,{base64.b64encode(data).decode()}"


URI = data_uri(png())


def task(image: object = URI, number: int = 1) -> dict:
  """A task as `TaskSimpleSerializer` writes it, with fewer of its fields."""
  return {
    "id": number, "project": 1, "data": {"image": image}, "annotations": [], "predictions": [],
    "meta": {}, "is_labeled": False, "overlap": 1, "file_upload": 1,
  }  # fmt: skip


def sent(*tasks: dict, config: str = CONFIG, context: object = None) -> dict:
  params = {"login": "", "password": "", "context": context}
  return {"tasks": list(tasks), "project": "1.1764500000", "label_config": config, "params": params}


@pytest.fixture
def server(tmp_path):
  return client(tmp_path, label_studio.router)


@pytest.fixture
def predict(server):
  """The results for a request, which must succeed."""

  def call(*tasks, **more):
    response = server[0].post("/label-studio/predict", json=sent(*tasks, **more))
    assert response.status_code == 200, response.text
    return response.json()["results"]

  return call


def refused(server, request: dict, status: int = 400) -> str:
  response = server[0].post("/label-studio/predict", json=request)
  assert response.status_code == status, response.text
  return response.json()["error"]["message"]


class TestConnecting:
  def test_health(self, server):
    for path in ("/label-studio/", "/label-studio/health"):
      assert server[0].get(path).json()["status"] == "UP"

  def test_setup(self, server):
    request = {
      "project": "1.1764500000", "schema": CONFIG, "hostname": "http://evil.example",
      "access_token": "x", "extra_params": None,
    }  # fmt: skip
    [version] = server[0].get("/label-studio/versions").json()["versions"]
    assert server[0].post("/label-studio/setup", json=request).json() == {"model_version": version}
    assert version.startswith("rules (")

  def test_webhooks_are_taken(self, server):
    event = {"action": "ANNOTATION_CREATED", "project": {"id": 1}}
    assert server[0].post("/label-studio/webhook", json=event).status_code == 200


class TestLabels:
  def test_one_task(self, predict, server):
    [prediction] = predict(task())
    regions = prediction["result"]
    assert [(one["from_name"], one["type"], one["score"]) for one in regions] == [
      ("brush", "brushlabels", 0.9),
      ("brush", "brushlabels", 0.6),
      ("polygon", "polygonlabels", 0.8),
      ("box", "rectanglelabels", 0.3),
    ]
    assert prediction["score"] == pytest.approx((0.9 + 0.6 + 0.8 + 0.3) / 4)
    for one in regions:
      assert (one["to_name"], one["image_rotation"]) == ("photo", 0)
      assert (one["original_width"], one["original_height"]) == (WIDTH, HEIGHT)
    assert len({one["id"] for one in regions}) == 4
    values = [one["value"] for one in regions]
    assert values[0]["brushlabels"] == ["lion"]
    assert values[0]["format"] == "rle"
    mask = decoded(values[0]["rle"]).reshape(HEIGHT, WIDTH, 4)
    expected = np.where(left_half((HEIGHT, WIDTH)), 255, 0)
    assert (mask == expected[..., None]).all()
    assert sorted(values[2]["points"]) == [[0, 0], [0, 100], [50, 0], [50, 100]]
    assert values[3] == {
      "x": 0, "y": 0, "width": 50, "height": 100, "rotation": 0, "rectanglelabels": ["dog"]
    }  # fmt: skip
    [asked] = server[1].asked
    assert (asked.threshold, asked.format) == (0.2, "rle")

  def test_boxes_alone_need_no_masks(self, predict, server):
    config = CONFIG.replace("BrushLabels", "Nothing").replace("PolygonLabels", "Nothing")
    [prediction] = predict(task(), config=config)
    assert [one["type"] for one in prediction["result"]] == ["rectanglelabels"] * 2
    assert server[1].asked[0].format == "none"

  def test_phrases_of_a_label(self, predict):
    config = CONFIG.replace('value="tree"', 'value="plant" predicted_values="tree,fern"')
    [prediction] = predict(task(), config=config)
    polygons = [one["value"] for one in prediction["result"] if one["from_name"] == "polygon"]
    assert [value["polygonlabels"] for value in polygons] == [["plant"]] * 2

  def test_many_labels_take_several_requests(self, predict, server):
    labels = "".join(f'<Label value="thing {i}"/>' for i in range(300))
    config = CONFIG.replace('<Label value="tree"/>', labels)
    [prediction] = predict(task(), config=config)
    assert len(prediction["result"]) == 303
    assert [len(asked.concepts) for asked in server[1].asked] == [128, 128, 47]

  def test_an_image_is_encoded_once(self, predict, server):
    for _ in range(2):
      predict(task(), task(data_uri(png(color="blue"))))
    assert server[1].uploads == 2

  def test_dropped_images_are_encoded_again(self, predict, server):
    predict(task())
    server[1].images.clear()
    assert len(predict(task())[0]["result"]) == 4
    assert server[1].uploads == 2


class TestSeveralTasks:
  def test_damaged_ones_have_no_prediction(self, predict):
    results = predict(task(), task("data:,abc", 2), task(number=3))
    assert [bool(result) for result in results] == [True, False, True]
    assert results[1] == []

  def test_all_are_damaged(self, server):
    assert "not an image" in refused(server, sent(task("data:,abc"), task("data:,abc")), 415)

  def test_too_many_are_sent_again_one_by_one(self, predict, server):
    """Label Studio does so if the number of results is 1."""
    assert predict(*[task(number=i) for i in range(17)]) == [[]]
    assert server[1].uploads == 0
    assert len(predict(*[task(number=i) for i in range(16)])) == 16

  def test_a_busy_server(self, server):
    server[1].error = ApiError("busy", "retry after 1 s.", {"Retry-After": "1"})
    refused(server, sent(task(), task()), 429)


class TestInteractive:
  @staticmethod
  def click(x: float, y: float, positive: int = 1) -> dict:
    value = {"x": x, "y": y, "width": 0.6, "keypointlabels": ["cat"]}
    return {
      "id": "k1", "from_name": "click", "to_name": "photo", "type": "keypointlabels",
      "original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0,
      "is_positive": bool(positive), "value": value,
    }  # fmt: skip

  def test_a_click(self, predict, server):
    [prediction] = predict(task(), context={"result": [self.click(50, 50)], "draft_id": 0})
    [region] = prediction["result"]
    assert (region["from_name"], region["value"]["brushlabels"]) == ("brush", ["cat"])
    assert prediction["score"] == 0.95  # the best of three masks
    mask = decoded(region["value"]["rle"]).reshape(HEIGHT, WIDTH, 4)[..., 3] > 0
    assert np.argwhere(mask).min(axis=0).tolist() == [25, 35]
    assert mask.sum() == 100
    [prompt] = server[1].asked[0].visual
    assert (prompt.points, prompt.multimask) == ([[40, 30]], True)

  def test_a_box(self, predict):
    value = {"x": 10, "y": 20, "width": 40, "height": 50, "rotation": 0}
    region = {
      "from_name": "box", "type": "rectanglelabels", "is_positive": True,
      "value": value | {"rectanglelabels": ["dog"]},
    }  # fmt: skip
    [prediction] = predict(task(), context={"result": [region]})
    [found] = prediction["result"]
    assert (found["from_name"], found["value"]["rectanglelabels"]) == ("box", ["dog"])
    assert [found["value"][key] for key in ("x", "y", "width", "height")] == [10, 20, 40, 50]

  def test_a_text(self, predict):
    region = {"from_name": "prompt", "type": "textarea", "value": {"text": ["lion"]}}
    [prediction] = predict(task(), context={"result": [region]})
    [found] = prediction["result"]
    assert (found["score"], found["value"]["brushlabels"]) == (0.9, ["lion"])

  def test_a_text_that_names_no_label(self, predict):
    region = {"from_name": "prompt", "type": "textarea", "value": {"text": "fox"}}
    [prediction] = predict(task(), context={"result": [region]})
    assert prediction["result"][0]["value"]["brushlabels"] == ["lion"]  # the first label

  def test_nothing_drawn(self, server):
    message = refused(server, sent(task(), context={"result": []}))
    assert "no positive key point, box or text" in message

  @pytest.mark.parametrize(
    ("region", "count", "match"),
    [
      ({"type": "keypointlabels", "value": {"x": 5, "y": 5}}, 63, "points: List should have"),
      ({"type": "textarea", "value": {"text": ["lion"] * 129}}, 1, "concepts: List should have"),
      ({"type": "textarea", "value": {"text": ["lion " * 300]}}, 1, "phrase: String should have"),
    ],
  )
  def test_too_much_is_drawn(self, server, region, count, match):
    assert match in refused(server, sent(task(), context={"result": [region] * count}))


class TestRefused:
  def test_a_long_phrase(self, server):
    config = CONFIG.replace('"cat"', f'"{"cat " * 300}"')
    assert "phrase: String should have at most 1000" in refused(server, sent(task(), config=config))

  def test_too_many_masks_to_decode(self, server, monkeypatch):
    monkeypatch.setitem(settings.MAX_MASK_PIXELS, "polygons", WIDTH * HEIGHT)
    assert "raise the threshold" in refused(server, sent(task()), 413)

  @pytest.mark.parametrize(
    ("image", "match"),
    [
      ("/data/upload/1/a.png", "start the server with --label-studio-url URL"),
      ("http://127.0.0.1/a.png", "start the server with --label-studio-url URL"),
      ("file:///etc/passwd", "start the server with --label-studio-url URL"),
      (None, "data.image of a task must be a string; got None"),
      (["a"], "data.image of a task must be a string"),
      ("data:image/png;base64,?", "not valid base64"),
    ],
  )
  def test_images(self, server, image, match):
    assert match in refused(server, sent(task(image)))

  def test_no_image_at_all(self, server):
    request = sent(task()) | {"tasks": [{"id": 1, "data": {"text": "a"}}]}
    assert "data.image of a task must be a string" in refused(server, request)

  def test_a_config_without_controls(self, server):
    assert "no control of image" in refused(
      server, sent(task(), config='<View><Image name="a" value="$image"/></View>')
    )

  @pytest.mark.parametrize(
    "change",
    [{"tasks": []}, {"tasks": [1]}, {"tasks": None}, {"tasks": [{}]}, {"label_config": None},
     {"params": {"context": 1}}, {"params": "x"}],
  )  # fmt: skip
  def test_wrong_types(self, server, change):
    response = server[0].post("/label-studio/predict", json=sent(task()) | change)
    assert response.status_code == 422  # the server's application makes 400 of it


def test_images_of_label_studio(tmp_path, monkeypatch):
  """They are read with the configured key; test_origin_client.py tests the reading."""
  read = []
  monkeypatch.setattr(
    label_studio.OriginClient, "read", lambda self, source: read.append(source) or png()
  )
  server = client(
    tmp_path, label_studio.router, label_studio_url="http://localhost:8080", label_studio_key="k"
  )
  response = server[0].post("/label-studio/predict", json=sent(task("/data/upload/1/a.png")))
  assert len(response.json()["results"][0]["result"]) == 4
  assert read == ["/data/upload/1/a.png"]


def test_an_invalid_url(tmp_path):
  with pytest.raises(ValueError, match="--label-studio-url must be like"):
    client(tmp_path, label_studio.router, label_studio_url="localhost:8080")
