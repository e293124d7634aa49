"""`Rules`: the thresholds of tracking in video.

They decide what becomes an object, how long it lasts, and what is remembered of it.

Names and defaults are those of Meta's released video model, unless a comment says otherwise.
"""

import dataclasses

from sam3_jax.utils.validation import check_flag, check_number

MAX_OBJECTS = 128  # the largest number of slots of the memory bank
LOGITS = 100.0  # the largest absolute value of a logit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
  """Thresholds of the tracker and of phrases in video; see `Rules.meta`."""

  # Reads the latest frames whose score exceeds `min_memory_score`; False reads the latest frames.
  memory_selection: bool = True
  min_memory_score: float = 0.01  # mean object score of a frame's group times its mean IoU
  max_num_objects: int = MAX_OBJECTS  # objects tracked at once; Meta has 10,000
  max_points: int = 16  # clicks read on a frame: the first half and the last half of them
  # Cells of the largest holes that are filled, and of the largest islands that are removed; 0 for
  # neither.
  fill_hole_area: int = 16
  # Leaves each cell of a tracked frame to one object, and hides an object that loses most of its
  # cells. False lets objects overlap, as Meta's tracker does by itself. Not for objects of phrases.
  separate_objects: bool = False
  shrink_threshold: float = 0.3  # of its cells that an object must keep among others

  score_threshold_detection: float = 0.5  # a detection's score must be above it
  det_nms_thresh: float = 0.1  # mask IoU above which the detection with the lower score is dropped
  suppress_det_close_to_boundary: bool = False  # drops detections centered near the frame's border
  new_det_thresh: float = 0.7  # least score of an object's first detection; 0 while there is none
  assoc_iou_thresh: float = 0.1  # least mask IoU of a detection and a tracked object that match
  trk_assoc_iou_thresh: float = 0.5  # below it for all detections, an object counts as unmatched
  # For that, matches each object with at most one detection.
  o2o_matching_masklets_enable: bool = False
  high_conf_thresh: float = 0.8  # least score of a detection that reconditions an object
  high_iou_thresh: float = 0.8  # its least mask IoU with the object
  recondition_min_logit: float = 0.8  # the object's own logit must be above it
  recondition_every_nth_frame: int = 16  # frames between two chances for that; 0 for never

  # Mask IoU from which the mask of a detection replaces the tracked mask that it matches best, in
  # results and memories; 0 for never, as with Meta.
  trust_detections: float = 0.0

  hotstart_delay: int = 15  # frames in which a new object may be removed, and results are held back
  hotstart_unmatch_thresh: int = 8  # unmatched frames that remove a new object
  hotstart_dup_thresh: int = 8  # frames as a duplicate of an older object that remove a new object
  # Mask IoU of two objects from which the one that was occluded last is hidden; 0 for never.
  suppress_overlapping_based_on_recent_occlusion_threshold: float = 0.7
  # False also hides an older object while its count is 0 or less: a frame adds 1 if a detection
  # matches the object, and subtracts 1 if it is unmatched.
  suppress_unmatched_only_within_hotstart: bool = True
  init_trk_keep_alive: int = 30  # the count of a new object
  max_trk_keep_alive: int = 30  # the largest count
  min_trk_keep_alive: int = -1  # the smallest count
  decrease_trk_keep_alive_for_empty_masklets: bool = False  # also subtracts for an empty mask
  # Shows an object only after N frames in a row in which it was detected.
  masklet_confirmation_enable: bool = False
  masklet_confirmation_consecutive_det_thresh: int = 3  # the N frames

  # Removes an object that was not confirmed on N frames in a row; 0 for never, as with Meta. Its
  # earlier results stay.
  max_lost_frames: int = 0
  # If there is no room for new objects, those that were lost the longest are removed for them.
  replace_lost: bool = True

  # Exemplar boxes are a prompt of the next frame, too. Meta's code does that, as it detects objects
  # of two frames at a time.
  boxes_on_next_frame: bool = False
  # On frames without a prompt for the detector, such as those after a box without a phrase, no
  # object counts as unmatched. With Meta's code such objects are removed after 8 frames.
  keep_unprompted: bool = True

  def __post_init__(self):
    for field in dataclasses.fields(self):
      name, value = f"rules {field.name}", getattr(self, field.name)
      if field.type is bool:
        check_flag(name, value)
      elif field.type is int:
        most = MAX_OBJECTS if field.name == "max_num_objects" else 2**16
        check_number(name, value, _LEAST.get(field.name, 0), most, whole=True)
      elif field.name == "recondition_min_logit":
        check_number(name, value, -LOGITS, LOGITS)
      else:
        check_number(name, value, 0, 1)

  @classmethod
  def meta(cls) -> "Rules":
    """The rules that decide everything as Meta's released code does, except for the largest number
    of objects."""
    return cls(boxes_on_next_frame=True, keep_unprompted=False, replace_lost=False)


_LEAST = {  # values of whole numbers
  "max_num_objects": 1, "max_points": 1, "hotstart_unmatch_thresh": 1, "hotstart_dup_thresh": 1,
  "min_trk_keep_alive": -1000, "masklet_confirmation_consecutive_det_thresh": 1,
}  # fmt: skip

DEFAULT_RULES = Rules()
