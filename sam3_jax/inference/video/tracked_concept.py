"""A concept prompt of a video, with the objects that it found."""

import dataclasses

from sam3_jax.inference.video.concept_objects import ConceptObjects
from sam3_jax.inputs.concept import Concept
from sam3_jax.inputs.prompts import ConceptPrompt, Prompt
from sam3_jax.rules import Rules


@dataclasses.dataclass(eq=False)
class TrackedConcept:
  """A concept prompt of a session, and its objects.

  Attributes:
    prompt: phrase, exemplars, or both.
    position: of the frame on which it was given.
    number: differs between the concepts of a session.
    objects: those it found so far.
  """

  prompt: ConceptPrompt
  position: int
  number: int
  objects: ConceptObjects = dataclasses.field(default_factory=ConceptObjects)

  @property
  def phrase(self) -> str | None:
    return self.prompt.text

  def takes_part(self, position: int, backward: bool) -> bool:
    """Whether it is searched on a frame: from its own frame on, in the direction of the pass."""
    return position <= self.position if backward else position >= self.position

  def prompt_on(self, position: int, backward: bool, rules: Rules) -> ConceptPrompt | None:
    """The detector's prompt on a frame; None if there is none. Boxes are of their own frame."""
    if isinstance(self.prompt, Concept) or not self.prompt.boxes:
      return self.prompt
    if position == self.position:
      return self.prompt
    if self.prompt.text is None:
      return None
    following = self.position + (-1 if backward else 1)
    if rules.boxes_on_next_frame and position == following:
      return self.prompt
    return Prompt(text=self.prompt.text)
