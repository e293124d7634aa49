"""X-AnyLabeling's protocol, with requests as version 4.2 of the client sends them."""

import base64

import pytest
from label_tools import HEIGHT, WIDTH, client
from test_label_studio import URI, png

from sam3_jax.server import anylabeling
from sam3_jax.server.anylabeling import CONCEPT_BOXES, CONCEPT_MASKS, MODEL, OBJECT

# A half of the image, from its first to its last point.
HALF = [[0, 0], [40, 0], [40, 60], [0, 60], [0, 0]]


def sent(**params) -> dict:
  always = {"conf_threshold": 0.5, "iou_threshold": 0.0, "epsilon_factor": 0.001}
  return {"model": MODEL, "image": URI, "params": always | params}


def point(x: int, y: int, label: int = 1) -> dict:
  return {"type": "point", "data": [x, y], "label": label}


def box(*corners: int, label: int = 1) -> dict:
  return {"type": "rectangle", "data": list(corners), "label": label}


@pytest.fixture
def server(tmp_path):
  return client(tmp_path, anylabeling.router)


@pytest.fixture
def predict(server):
  """The shapes for a request, which must succeed."""

  def call(**params):
    response = server[0].post("/anylabeling/v1/predict", json=sent(**params))
    assert response.status_code == 200, response.text
    assert response.json()["success"]
    return response.json()["data"]["shapes"]

  return call


class TestModels:
  def test_the_list(self, server):
    models = server[0].get("/anylabeling/v1/models").json()
    assert models["success"]
    info = models["data"][MODEL]
    assert info["display_name"] == "sam3-jax: rules"
    assert [task["id"] for task in info["available_tasks"]] == [
      CONCEPT_MASKS, CONCEPT_BOXES, OBJECT
    ]  # fmt: skip
    names = {widget["name"] for widget in info["widgets"]}
    assert all(names >= set(task["active_widgets"]) for task in info["available_tasks"])
    values = {widget["name"]: widget["value"] for widget in info["widgets"]}
    assert (values["edit_conf"], values["mask_fineness_slider"]) == (0.5, 10)

  def test_one_model(self, server):
    info = server[0].get(f"/anylabeling/v1/models/{MODEL}/info").json()["data"]
    assert info["model_id"] == MODEL
    assert server[0].get("/anylabeling/v1/models/other/info").status_code == 404

  def test_health(self, server):
    assert server[0].get("/anylabeling/health").json()["status"] == "healthy"


class TestConcepts:
  def test_a_phrase(self, predict):
    [shape] = predict(text_prompt="lion", current_task=CONCEPT_MASKS)
    assert (shape["label"], shape["shape_type"], shape["score"]) == ("lion", "polygon", 0.9)
    assert shape["points"][0] == shape["points"][-1]
    assert sorted(shape["points"]) == sorted(HALF)
    assert shape["group_id"] is None

  def test_boxes(self, predict, server):
    [shape] = predict(text_prompt="lion", current_task=CONCEPT_BOXES)
    assert shape["shape_type"] == "rectangle"
    assert shape["points"] == HALF[:4]  # clipped to the image
    assert server[1].asked[0].format == "none"

  @pytest.mark.parametrize(
    ("text", "phrases"),
    [
      ("lion,cat", ["lion", "cat"]),
      ("lion. cat .", ["lion", "cat"]),
      ("lion, lion", ["lion"]),
      ("no.5 sign, cat", ["no.5 sign", "cat"]),
    ],
  )
  def test_several_phrases(self, predict, server, text, phrases):
    predict(text_prompt=text)
    assert [concept.phrase for concept in server[1].asked[0].concepts] == phrases

  def test_the_threshold(self, predict):
    assert predict(text_prompt="cat", conf_threshold=0.7) == []
    assert len(predict(text_prompt="dog", conf_threshold=0.0)) == 1

  def test_exemplars(self, predict, server):
    marks = [box(30, 40, 10, 20), box(1, 2, 3, 4, label=0)]
    [shape] = predict(marks=marks)
    assert shape["label"] == "AUTOLABEL_OBJECT"
    [concept] = server[1].asked[0].concepts
    assert (concept.boxes, concept.box_labels) == ([[10, 20, 30, 40], [1, 2, 3, 4]], [1, 0])

  def test_a_phrase_with_exemplars(self, predict, server):
    [shape] = predict(text_prompt="lion", marks=[box(1, 2, 3, 4)])
    assert shape["label"] == "lion"
    assert server[1].asked[0].concepts[0].boxes == [[1, 2, 3, 4]]

  def test_an_image_is_encoded_once(self, predict, server):
    for phrase in ("lion", "cat", "dog"):
      predict(text_prompt=phrase)
    assert server[1].uploads == 1


class TestObjects:
  def test_points(self, predict, server):
    [shape] = predict(marks=[point(40, 30)], current_task=OBJECT)
    assert (shape["label"], shape["score"]) == ("AUTOLABEL_OBJECT", 0.95)
    assert sorted(shape["points"][:-1]) == [[35, 25], [35, 35], [45, 25], [45, 35]]
    assert server[1].asked[0].visual[0].multimask

  def test_points_and_a_box(self, predict, server):
    predict(marks=[point(40, 30), point(5, 5, 0), box(60, 50, 20, 10)], current_task=OBJECT)
    [prompt] = server[1].asked[0].visual
    assert (prompt.points, prompt.point_labels) == ([[40, 30], [5, 5]], [1, 0])
    assert (prompt.box, prompt.multimask) == ([20, 10, 60, 50], False)

  def test_a_box_alone(self, predict, server):
    predict(marks=[box(20, 10, 60, 50)], current_task=OBJECT)
    assert server[1].asked[0].visual[0].box == [20, 10, 60, 50]


@pytest.mark.parametrize(
  "params",
  [{}, {"text_prompt": " . "}, {"marks": []}, {"marks": [point(1, 1, 0)]},
   {"marks": [box(1, 1, 9, 9, label=0)]}],
)  # fmt: skip
def test_without_positive_prompts(predict, server, params):
  assert predict(**params) == []
  assert server[1].asked == []


def test_raw_base64(server):
  request = sent(text_prompt="lion") | {"image": base64.b64encode(png()).decode()}
  shapes = server[0].post("/anylabeling/v1/predict", json=request).json()["data"]["shapes"]
  assert shapes[0]["points"][2] == [WIDTH / 2, HEIGHT]


@pytest.mark.parametrize(
  ("change", "status", "match"),
  [
    ({"model": "yolo11n"}, 404, "there is no model 'yolo11n'; use sam3-jax"),
    ({"image": "data:image/png;base64,!"}, 400, "not valid base64"),
    ({"image": "http://127.0.0.1/a.png"}, 400, "not valid base64"),
    ({"image": "AAAA"}, 415, "not an image"),
    ({"params": {"marks": [{"type": "point", "data": [1, 2, 3]}]}}, 400, "needs data"),
    ({"params": {"marks": [{"type": "rectangle", "data": [1, 2]}]}}, 400, "needs data"),
    ({"params": {"marks": [point(5, 5)] * 63}}, 400, "points: List should have at most 62 items"),
    ({"params": {"marks": [box(1, 1, 9, 9)] * 129}}, 400, "boxes: List should have at most 128"),
    ({"params": {"text_prompt": "lion " * 300}}, 400, "phrase: String should have at most 1000"),
  ],
)
def test_invalid_requests(server, change, status, match):
  request = sent(text_prompt="lion") | change
  response = server[0].post("/anylabeling/v1/predict", json=request)
  assert (response.status_code, match in response.json()["error"]["message"]) == (status, True)
