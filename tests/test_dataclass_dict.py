"""Dataclasses from plain values: types, unions, tuples, missing fields; and their documentation."""

import dataclasses
import re

import pytest

from sam3_jax.config import Config, LiteTextConfig, StemConfig, TextConfig, TrunkConfig
from sam3_jax.training.config import TrainConfig
from sam3_jax.training.dense_pretraining import DenseConfig
from sam3_jax.training.examples import DataConfig
from sam3_jax.training.lora import LoraConfig
from sam3_jax.training.losses import LossConfig
from sam3_jax.training.optimizer import OptimizerConfig
from sam3_jax.training.sources import SceneConfig
from sam3_jax.training.visual import VisualConfig
from sam3_jax.utils.dataclass_dict import from_dict
from sam3_jax.utils.field_docs import field_docs

TRAINING = (
  TrainConfig, DenseConfig, DataConfig, LoraConfig, LossConfig, OptimizerConfig, SceneConfig,
  VisualConfig,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
  x: float
  y: float = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Circle:
  center: Point
  radius: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
  shape: Point | Circle | None = None
  size: tuple[int, int] | None = None
  colors: tuple[tuple[str, float], ...] = ()
  points: tuple[Point, ...] = ()
  visible: bool = True


@pytest.mark.parametrize(
  ("values", "expected"),
  [
    ({}, Drawing()),
    ({"shape": None, "size": None}, Drawing()),
    ({"shape": {"x": 1}}, Drawing(shape=Point(x=1.0))),
    (
      {"shape": {"center": {"x": 1.5}, "radius": 2}},
      Drawing(shape=Circle(center=Point(x=1.5), radius=2.0)),
    ),
    ({"size": [3, 4]}, Drawing(size=(3, 4))),
    ({"colors": {"red": 1, "blue": 0.5}}, Drawing(colors=(("red", 1.0), ("blue", 0.5)))),
    ({"colors": [["red", 1]]}, Drawing(colors=(("red", 1.0),))),
    ({"points": [{"x": 0.5}]}, Drawing(points=(Point(x=0.5),))),
    ({"visible": False}, Drawing(visible=False)),
  ],
)
def test_values_are_converted(values, expected):
  built = from_dict(Drawing, values, what="a drawing")
  assert built == expected
  assert hash(built) == hash(expected)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ([], "it must be an object with the fields of Drawing; got []."),
    ({"shap": 1}, "'shap' is not a field of a drawing; did you mean shape?"),
    ({"zzz": 1}, "'zzz' is not a field of a drawing; Drawing has shape, size, colors, "),
    ({"shape": {}}, "shape lacks x."),
    ({"shape": {"center": {"x": 1.0}}}, "shape lacks radius."),
    ({"shape": {"x": 1.0, "z": 2.0}}, "'shape.z' is not a field of a drawing; Point has x, y."),
    ({"shape": 3}, "shape must be an object with the fields of Point; got 3."),
    ({"size": [1, 2, 3]}, "size must have 2 values; got [1, 2, 3]."),
    ({"size": 1}, "size must be a list; got 1."),
    ({"size": [1, 2.5]}, "size[1] must be of type int; got 2.5."),
    ({"size": [True, 1]}, "size[0] must be of type int; got True."),
    ({"points": {"x": 1.0}}, "points must be a list; got {'x': 1.0}."),
    ({"colors": [["red", "1"]]}, "colors[0][1] must be of type float; got '1'."),
    ({"colors": [["red", 10**400]]}, "colors[0][1] must be of type float; got "),
    ({"visible": 1}, "visible must be of type bool; got 1."),
  ],
)
def test_invalid_values_are_refused(values, message):
  with pytest.raises(ValueError, match=re.escape(message)) as caught:
    from_dict(Drawing, values, what="a drawing")
  assert "\n" not in str(caught.value)


def test_all_fields_may_be_required():
  remedy = "Write it again."
  values = {"x": 1, "y": 2}
  assert from_dict(Point, values, "point", complete=remedy) == Point(x=1.0, y=2.0)
  message = "point must have exactly the fields of Point; unknown: ['z'], missing: ['y']. Write it"
  with pytest.raises(ValueError, match=re.escape(message)):
    from_dict(Point, {"x": 1, "z": 2}, "point", complete=remedy)


@pytest.mark.parametrize("cls", TRAINING)
def test_every_training_field_is_documented(cls):
  documented = field_docs(cls)
  assert [*documented] == [field.name for field in dataclasses.fields(cls)]
  assert [name for name, text in documented.items() if not text.endswith(".")] == []


@pytest.mark.parametrize("cls", [Config, TrunkConfig, StemConfig, TextConfig, LiteTextConfig])
def test_fields_of_the_model_are_read_too(cls):
  assert [*field_docs(cls)] == [field.name for field in dataclasses.fields(cls)]


def test_comments_above_and_beside_a_field_are_joined():
  @dataclasses.dataclass
  class Example:
    # First line,
    # second line.
    a: int = 1  # of pixels

    # Not of any field.

    b: int = 2
    c: tuple[int, ...] = (
      1,  # not of the field
    )

  assert field_docs(Example) == {"a": "First line, second line. of pixels", "b": "", "c": ""}
