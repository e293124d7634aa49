"""The jitted functions of video.

Each is compiled once for a number of slots of the bank (`bank.BUCKETS`); `track` twice, for one
conditioning frame and for several.
"""

import copy
import dataclasses
from typing import Any

import jax
from jax.typing import DTypeLike

from sam3_jax.config import Config
from sam3_jax.inference.video import bank as banks
from sam3_jax.inference.video.functions import VideoFunctions
from sam3_jax.model.video.tracker import video_config
from sam3_jax.rules import Rules

_COMPILED = ("separate_objects", "shrink_threshold")  # rules that the functions depend on


class VideoPrograms:
  """The jitted functions of a model with tracker; parameters first.

  Attributes:
    encode: (params, pixels u8[1, Hi, Wi, 3], or normalized float32) to a visual embedding.
    encode_both: (params, pixels, sizes i32[1, 2]) to an image embedding for concepts, and a visual
      embedding.
    read: (params, bank, embedding, reads) to the coarse map of each slot after memory attention.
    answer: (params, embedding, prompts, ambiguous bool[O]) to `TrackedObjects`, for points, boxes
      and earlier masks, without memory.
    answer_with_memory: (params, bank, embedding, reads, slot, prompts, ambiguous) likewise for one
      prompt; `reads` has a single row, which is of `slot`.
    answer_mask: (params, embedding, mask f32[O, S, S] at 16 times the grid) to `TrackedObjects`;
      its mask, IoU and object logit are not those of the object.
    track: (params, bank, embedding, reads, rows) to the bank, `TrackedObjects` and memories. `rows`
      is where each slot's memory is written. Consumes the bank.
    propagate: (params, bank, embedding, reads, clicked bool[O]) to `TrackedObjects`; `clicked` is
      false for objects of concepts. Makes no memory.
    memorize_tracked: (params, bank, embedding, objects, rows) to the bank and memories, for clicked
      objects after `propagate`. Consumes the bank.
    memorize_found: (params, bank, embedding, mask_logits, pointers, owner, order, rows) to the bank
      and memories, for objects of concepts. `owner` is the number of each slot's concept, `order`
      the position among its objects. Consumes the bank.
    remember: (params, bank, embedding, objects, group, order, rows) to the bank and memories.
      `objects` is a `TrackedObjects` with the answers of prompts, `group` the number of each slot's
      group, `order` its position there. Consumes the bank.
    write: (bank, rows, memories, pointers) to the bank, which it consumes.
  """

  def __init__(self, config: Config, dtype: DTypeLike):
    video_config(config)
    functions = VideoFunctions(config, dtype)
    self.config, self.dtype = config, dtype
    self.encode: Any = jax.jit(functions.encode)
    self.encode_both: Any = jax.jit(functions.encode_both)
    self.read: Any = jax.jit(functions.read)
    self.answer: Any = jax.jit(functions.answer)
    self.answer_with_memory: Any = jax.jit(functions.answer_with_memory)
    self.answer_mask: Any = jax.jit(functions.answer_mask)
    self.track: Any = jax.jit(functions.track, donate_argnames="bank")
    self.propagate: Any = jax.jit(functions.propagate)
    self.memorize_tracked: Any = jax.jit(functions.memorize_tracked, donate_argnames="bank")
    self.memorize_found: Any = jax.jit(functions.memorize_found, donate_argnames="bank")
    self.remember: Any = jax.jit(functions.remember, donate_argnames="bank")
    self.write: Any = jax.jit(banks.write, donate_argnames="bank")
    self._others: dict[tuple[Any, ...], VideoPrograms] = {}

  def with_rules(self, rules: Rules) -> "VideoPrograms":
    """The programs for other rules than those of the checkpoint, which differ only in the rules of
    `_COMPILED`; the session applies the others."""
    video = video_config(self.config)
    own = {name: getattr(video.rules, name) for name in _COMPILED}
    wanted = {name: getattr(rules, name) for name in _COMPILED}
    if wanted == own:
      return self
    key = tuple(wanted.values())
    if key not in self._others:
      changed = dataclasses.replace(video.rules, **wanted)
      config = dataclasses.replace(self.config, video=dataclasses.replace(video, rules=changed))
      functions = VideoFunctions(config, self.dtype)
      other = self._others[key] = copy.copy(self)
      other.config = config
      other.track = jax.jit(functions.track, donate_argnames="bank")
      other.propagate = jax.jit(functions.propagate)
      other.memorize_found = jax.jit(functions.memorize_found, donate_argnames="bank")
    return self._others[key]

  @property
  def compilations(self) -> dict[str, int]:
    """How often each function was compiled."""
    return {name: x._cache_size() for name, x in vars(self).items() if hasattr(x, "_cache_size")}
