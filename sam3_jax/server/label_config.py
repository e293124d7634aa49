"""Reads Label Studio's labeling configuration: which controls an image has, and their labels."""

import dataclasses
from collections.abc import Iterator
from xml.etree import ElementTree

MASKS, POLYGONS, BOXES, POINTS = "brushlabels", "polygonlabels", "rectanglelabels", "keypointlabels"
RESULTS = (MASKS, POLYGONS, BOXES)  # in the order in which a control is chosen for a label
MAX_CHARACTERS = 1_000_000
MAX_PHRASES = 1_000  # of all labels


@dataclasses.dataclass(frozen=True)
class Label:
  """A label of a control.

  Attributes:
    name: as results name it: the alias, if there is one.
    phrases: text prompts that find it: `predicted_values`, split at commas, or its name.
  """

  name: str
  phrases: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Control:
  """A tag such as BrushLabels.

  Attributes:
    name: `from_name` of its results.
    type: the tag in lower case, which is the type of its results.
    threshold: `model_score_threshold`, or None.
    boxes_are_exemplars: `model_box="exemplar"`: its boxes are exemplars of a concept, instead of
      boxes around one object.
  """

  name: str
  type: str
  labels: tuple[Label, ...]
  threshold: float | None = None
  boxes_are_exemplars: bool = False


@dataclasses.dataclass(frozen=True)
class LabelConfig:
  """The first image of a configuration and its controls.

  Attributes:
    image: `to_name` of results.
    field: field of a task's data that contains the image.
    controls: in their order.
  """

  image: str
  field: str
  controls: tuple[Control, ...]

  def control(self, label: str) -> Control | None:
    """The control for results with a label: brush, else polygon, else rectangle."""
    for kind in RESULTS:
      for control in self.controls:
        if control.type == kind and any(label == one.name for one in control.labels):
          return control
    return None

  def named(self, name: object) -> Control | None:
    return next((control for control in self.controls if control.name == name), None)

  def result_labels(self) -> Iterator[tuple[Control, Label]]:
    """Each label that can have results, once, with its control."""
    names = {label.name: label for control in self.controls for label in control.labels}
    for name, label in names.items():
      if control := self.control(name):
        yield control, label


def parse_label_config(text: str) -> LabelConfig:
  """Parses a configuration.

  Raises:
    ValueError: it is not XML, declares entities, has no image or no control for results, or is
      too large.
  """
  if len(text) > MAX_CHARACTERS or "<!DOCTYPE" in text or "<!ENTITY" in text:
    raise ValueError(
      f"the label config must be XML of at most {MAX_CHARACTERS} characters without declarations."
    )
  try:
    root = ElementTree.fromstring(text)
  except ElementTree.ParseError as error:
    raise ValueError(f"the label config is not XML: {error}.") from None
  tags = list(root.iter())
  images = (tag for tag in tags if _kind(tag) == "image")
  image = next((tag for tag in images if tag.get("name") and tag.get("value")), None)
  if image is None:
    raise ValueError('the label config has no <Image name="..." value="$...">.')
  name = image.get("name", "")
  own = [tag for tag in tags if name in tag.get("toName", tag.get("toname", "")).split(",")]
  controls = tuple(_control(tag) for tag in own if _kind(tag) in (*RESULTS, POINTS))
  if sum(len(label.phrases) for control in controls for label in control.labels) > MAX_PHRASES:
    raise ValueError(f"the labels of the label config have more than {MAX_PHRASES} phrases.")
  if not any(control.type in RESULTS and control.labels for control in controls):
    raise ValueError(
      f"no control of image {name!r} can show results; add <BrushLabels>, <PolygonLabels> or "
      f'<RectangleLabels> with labels and toName="{name}".'
    )
  return LabelConfig(name, image.get("value", "").removeprefix("$"), controls)


def _kind(tag: ElementTree.Element) -> str:
  return str(tag.tag).lower()


def _control(tag: ElementTree.Element) -> Control:
  name = tag.get("name")
  if not name:
    raise ValueError(f"a <{tag.tag}> of the label config has no name.")
  return Control(
    name=name,
    type=_kind(tag),
    labels=tuple(_labels(tag)),
    threshold=_threshold(tag),
    boxes_are_exemplars=tag.get("model_box") == "exemplar",
  )


def _labels(tag: ElementTree.Element) -> Iterator[Label]:
  for label in tag.iter():
    if _kind(label) != "label":
      continue
    value = label.get("alias") or label.get("value")
    if value:
      given = (phrase.strip() for phrase in label.get("predicted_values", "").split(","))
      yield Label(value, tuple(filter(None, given)) or (value,))


def _threshold(tag: ElementTree.Element) -> float | None:
  given = tag.get("model_score_threshold")
  if given is None:
    return None
  try:
    value = float(given)
  except ValueError:
    value = -1.0
  if not 0 <= value <= 1:
    raise ValueError(f"model_score_threshold={given!r:.40} must be a number in [0, 1].")
  return value
