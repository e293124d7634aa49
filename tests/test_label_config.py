"""Label Studio's label configs, and the regions that an annotator drew."""

import pytest

from sam3_jax.server.errors import ApiError
from sam3_jax.server.label_config import parse_label_config
from sam3_jax.server.label_context import read_context

CONFIG = """
<View>
  <!-- comments and other tags are ignored -->
  <Header value="Find animals"/>
  <Image name="photo" value="$image" zoom="true"/>
  <BrushLabels name="brush" toName="photo" model_score_threshold="0.25">
    <Label value="Lion" alias="lion"/>
    <Label value="Cat" predicted_values="cat, kitten"/>
  </BrushLabels>
  <RectangleLabels name="box" toName="photo" smart="true">
    <Label value="lion"/><Label value="Cat"/><Label value="tree"/>
  </RectangleLabels>
  <RectangleLabels name="like" toName="photo" smart="true" model_box="exemplar">
    <Label value="tree"/>
  </RectangleLabels>
  <KeyPointLabels name="click" toName="photo" smart="true"><Label value="lion"/></KeyPointLabels>
  <PolygonLabels name="other" toName="elsewhere"><Label value="rock"/></PolygonLabels>
</View>"""


def view(inside: str) -> str:
  return f'<View><Image name="i" value="$image"/>{inside}</View>'


def brush(attributes: str, label: str = '<Label value="a"/>') -> str:
  return view(f'<BrushLabels name="b" toName="i" {attributes}>{label}</BrushLabels>')


def test_controls_and_labels():
  config = parse_label_config(CONFIG)
  assert (config.image, config.field) == ("photo", "image")
  assert [control.name for control in config.controls] == ["brush", "box", "like", "click"]
  assert [
    (control.name, label.name, label.phrases) for control, label in config.result_labels()
  ] == [
    ("brush", "lion", ("lion",)),
    ("brush", "Cat", ("Cat",)),
    ("box", "tree", ("tree",)),
  ]
  assert [control.threshold for control in config.controls] == [0.25, None, None, None]
  assert [control.boxes_are_exemplars for control in config.controls] == [False, False, True, False]


@pytest.mark.parametrize(
  ("text", "match"),
  [
    ("", "not XML"),
    ("<View>", "not XML"),
    ("<View/>", "no <Image"),
    ('<View><Image name="i"/></View>', "no <Image"),
    (view(""), "no control of image 'i' can show results"),
    (view('<BrushLabels name="b" toName="i"/>'), "no control of image 'i'"),
    (view('<KeyPointLabels name="k" toName="i"><Label value="a"/></KeyPointLabels>'), "no control"),
    (view('<BrushLabels toName="i"><Label value="a"/></BrushLabels>'), "has no name"),
    (brush('model_score_threshold="much"'), r"must be a number in \[0, 1\]"),
    (brush('model_score_threshold="nan"'), r"must be a number in \[0, 1\]"),
    (brush('model_score_threshold="1.5"'), r"must be a number in \[0, 1\]"),
    (brush("", '<Label value="a"/>' * 1001), "more than 1000 phrases"),
    (brush("", f'<Label value="a" predicted_values="{"b," * 1001}"/>'), "more than 1000 phrases"),
    ('<!DOCTYPE a [<!ENTITY b "c">]>' + view(""), "without declarations"),
    (view("x" * 1_000_001), "at most 1000000 characters"),
    ("<a>" * 100_000, "not XML"),
  ],
)
def test_invalid_configs(text, match):
  with pytest.raises(ValueError, match=match):
    parse_label_config(text)


def test_deep_configs():
  deep = "<View>" * 50_000 + brush("") + "</View>" * 50_000
  assert parse_label_config(deep).image == "i"


def region(kind: str, value: dict, **more) -> dict:
  return {"type": kind, "value": value, "from_name": "box", **more}


def point(x: float, y: float, **more) -> dict:
  return region(
    "keypointlabels", {"x": x, "y": y, "width": 0.5, "keypointlabels": ["lion"]}, **more
  )


def box(x: float, y: float, w: float, h: float, rotation: float = 0, **more) -> dict:
  value = {"x": x, "y": y, "width": w, "height": h, "rotation": rotation}
  return region("rectanglelabels", value | {"rectanglelabels": ["Cat"]}, **more)


def text(line) -> dict:
  return region("textarea", {"text": line})


def read(*regions):
  return read_context(list(regions), parse_label_config(CONFIG), 200, 100)


class TestContext:
  def test_points(self):
    found = read(point(50, 50), point(10, 20, is_positive=False), point(100, 100))
    assert (found.label, found.concepts) == ("lion", [])
    [prompt] = found.visual
    assert prompt.points == [[100, 50], [20, 20], [200, 100]]
    assert prompt.point_labels == [1, 0, 1]
    assert (prompt.box, prompt.multimask) == (None, False)

  def test_a_single_point_is_ambiguous(self):
    assert read(point(50, 50)).visual[0].multimask

  def test_points_and_a_box(self):
    found = read(point(50, 50), box(10, 10, 50, 80))
    [prompt] = found.visual
    assert (prompt.points, prompt.box, prompt.multimask) == ([[100, 50]], [20, 10, 120, 90], False)
    assert found.label == "Cat"

  def test_several_boxes(self):
    found = read(box(0, 0, 10, 10), box(50, 50, 10, 10), box(1, 1, 2, 2, is_positive=False))
    assert [prompt.box for prompt in found.visual] == [[0, 0, 20, 10], [100, 50, 120, 60]]

  def test_rotated_boxes(self):
    [prompt] = read(box(50, 20, 20, 10, rotation=90)).visual  # 40 x 10 pixels, turned clockwise
    assert prompt.box == pytest.approx([90, 20, 100, 60])

  def test_boxes_are_clipped(self):
    assert read(box(-10, 50, 200, 100)).visual[0].box == [0, 50, 200, 100]

  def test_exemplars(self):
    found = read(box(0, 0, 10, 10, from_name="like"), box(5, 5, 9, 9, is_positive=False))
    [concept] = found.concepts
    assert (concept.phrase, concept.box_labels, found.visual) == (None, [1, 0], [])

  def test_text(self):
    found = read(text(["lion, cat", " dog "]), box(0, 0, 10, 10))
    assert [concept.phrase for concept in found.concepts] == ["lion", "cat", "dog"]
    assert all(concept.boxes == [[0, 0, 20, 10]] for concept in found.concepts)

  @pytest.mark.parametrize(
    ("regions", "match"),
    [
      (None, "must be a list"),
      ({}, "must be a list"),
      ([{}] * 201, "at most 200 regions"),
      ([], "no positive key point"),
      ([point(1, 1, is_positive=0)], "no positive key point"),
      (["lion"], "must have a type and a value"),
      ([{"type": 1, "value": {}}], "must have a type and a value"),
      ([{"type": "keypointlabels", "value": []}], "must have a type and a value"),
      ([point("1", 1)], "x of a region must be a number"),
      ([point(True, 1)], "x of a region must be a number"),
      ([point(1, float("nan"))], "y of a region must be a number"),
      ([point(1, 1e300)], "y of a region must be a number"),
      ([region("rectanglelabels", {"x": 1, "y": 1, "width": 1})], "height of a region"),
      ([text([1])], "text of a region must be strings"),
      ([text(None)], "text of a region must be strings"),
    ],
  )
  def test_invalid_regions(self, regions, match):
    with pytest.raises(ApiError, match=match):
      read_context(regions, parse_label_config(CONFIG), 200, 100)
