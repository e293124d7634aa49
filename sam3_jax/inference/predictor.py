"""`Sam3`: a checkpoint bound to jitted encode and decode.

A program is compiled for each shape of its inputs, so images, phrases and prompts are cut into
batches of the few sizes below: no padding is computed, and the compilations are bounded.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, UInt8

from sam3_jax.checkpoint import bundle as checkpoint
from sam3_jax.config import Config
from sam3_jax.inference import sharding as parallel
from sam3_jax.inference.aot import Program, programs
from sam3_jax.inference.batch_sharding import Placement
from sam3_jax.inference.batching import (
  batches,
  batches_by_image,
  distinct,
  join,
  lengths,
  ordinals,
  take,
)
from sam3_jax.inference.output_buffer import Room
from sam3_jax.inference.provenance import own_embedding, own_text
from sam3_jax.inputs.preprocess import MAX_PIXELS, ImageSource, read_image, resize
from sam3_jax.inputs.prompts import Prompt, as_prompts, check_boxes, image_indices, pack
from sam3_jax.inputs.tokenizer import Tokenizer
from sam3_jax.inputs.visual_prompts import (
  VisualPrompt,
  as_visual_prompts,
  check_visual,
  pack_visual,
)
from sam3_jax.model.sam3 import Detector
from sam3_jax.model.visual.head import READINGS, VisualHead
from sam3_jax.types import Detections, ImageEmbedding, Prompts, Scored, TextEmbedding, VisualMasks
from sam3_jax.utils import devices
from sam3_jax.utils.identity import Origin, checkpoint_identity
from sam3_jax.utils.param_tree import describe, flatten
from sam3_jax.utils.paths import resolve_path
from sam3_jax.utils.validation import check_flag, is_number, is_whole

if TYPE_CHECKING:
  from sam3_jax.inference.mask_generator import MaskGeneration, Segments

IMAGE_BATCHES = (4, 1)
TEXT_BATCHES = (16, 4, 1)
VISUAL_BATCHES = (16, 4, 1)  # 22 MB a prompt at the released size, as XLA plans for a CPU
MEMORY_BUDGET = 4_000_000_000  # bytes: all masks of 59 prompts of the released model in float32


class Sam3:
  """SAM 3 on still images: encode an image once, prompt it many times; by concepts (`decode`), and
  by points, boxes and masks (`decode_visual`).

  Attributes:
    config: sizes of the model.
    params: pytree of its parameters.
    tokenizer: phrases to token ids.
    info: what the checkpoint says of itself: name, source, licence, whether it is trained.
    dtype: of the computation.
    mesh: what it computes on; None for one device.
    device: the one it computes on; None with a mesh.
    identity: of the checkpoint, digest of parameters, configuration and tokenizer; see below.

  It can be copied, and pickled unless it has a mesh: parameters travel as NumPy arrays, and go to
  the default device of the process that unpickles them, or to the first of its platform if `device`
  was given.
  """

  def __init__(
    self,
    config: Config,
    params: Any,
    tokenizer: Tokenizer,
    *,
    info=None,
    dtype=None,
    mesh: Mesh | None = None,
    rules: parallel.Rules = parallel.WHOLE,
    device: Any = None,
  ):
    """Binds parameters (`model.sam3.init` makes random ones) to jitted functions.

    Args:
      config: sizes of the model.
      params: pytree of arrays, `model.sam3.parameter_shapes(config)` in shape (to compile only,
        `jax.ShapeDtypeStruct`s that say where they lie); for visual prompts
        with a part `visual`, `visual.head.parameter_shapes(config)` in shape.
      tokenizer: phrases to token ids.
      info: what `save` should note about them.
      dtype: "float32" or "bfloat16"; None for bfloat16 on TPU and GPU, float32 on CPU.
      mesh: of `parallel.make_mesh`; images and prompts are then sharded over its devices.
      rules: how it holds the parameters; whole on each device, if not given.
      device: that it computes on, a `jax.Device` or a platform such as "cpu"; None for the one that
        the parameters are committed to, else `jax.default_device`, else the first device of this
        process.

    Raises:
      ValueError: both a device and a mesh, a device that does not exist, or one of another process.
    """
    self.config, self.tokenizer, self.mesh, self._rules = config, tokenizer, mesh, rules
    self._device = _check_place(device, mesh)
    self.device = None if mesh is not None else self._device or devices.default_device()
    self._placement = Placement(mesh, self.device)
    self.params = params
    self.info = dict(info or {})
    self._load_unread: Callable[[], Mapping[str, np.ndarray]] = dict
    self.dtype = checkpoint.check_dtype(default_dtype(self.device) if dtype is None else dtype)
    detector, head = Detector(config, self.dtype), VisualHead(config, self.dtype)

    def encode_text(params, tokens):
      return detector.apply({"params": params}, tokens, method=Detector.encode_text)

    self._encode_image = parallel.image_encoder(detector, mesh, rules, keep=lambda *both: both)
    self._encode_text = jax.jit(encode_text)
    makers = parallel.prompt_decoder, parallel.prompt_scorer, parallel.mask_maker
    self._detect, self._score, self._mask = (make(detector, mesh, rules) for make in makers)
    self._few = [make(detector, mesh, rules, split=True) for make in makers] if mesh else []
    self._encode_visual = parallel.visual_encoder(head, mesh, rules)
    self._decode_visual = parallel.visual_decoder(head, mesh, rules)

  @classmethod
  def from_checkpoint(
    cls,
    path: str | Path,
    *,
    dtype: str | None = None,
    verify: bool = False,
    mesh: Mesh | None = None,
    rules: parallel.Rules = parallel.WHOLE,
    device: Any = None,
    ahead: Mapping[str, Any] | None = None,
    progress: Callable[[str, float], None] | None = None,
  ) -> "Sam3":
    """Loads a bundle.

    Args:
      path: the bundle's folder, or `gs://bucket/path`; `sam3-jax convert` writes one from released
        weights.
      dtype: "float32" or "bfloat16"; None for bfloat16 on TPU and GPU, float32 on CPU.
      verify: compare the checksums of all files first; those of small ones always are.
      mesh, rules: as above; the parameters are read straight to where they belong.
      device: that it computes on, a `jax.Device` or a platform such as "cpu"; None for
        `jax.default_device`, if it is set, else the first device of this process.
      ahead: what `compile` takes, such as `{"images": 1, "prompts": 4}`: these programs are
        compiled while the parameters are read.
      progress: as `checkpoint.load` takes it.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: not a bundle, or a damaged one, and the message names the first fault; or a device
        or a mesh that cannot be used.
    """
    chosen = _check_place(device, mesh) or devices.default_device()
    dtype = default_dtype(None if mesh else chosen) if dtype is None else dtype
    sharding = jax.sharding.SingleDeviceSharding(chosen)
    if mesh is not None:
      sharding = parallel.parameter_sharding(mesh, rules)
    bundle, read = checkpoint.begin(
      path, dtype=dtype, verify=verify, sharding=sharding, progress=progress
    )
    tokenizer = Tokenizer(bundle.tokenizer, context=bundle.config.text.context)
    model = cls(
      bundle.config, bundle.params, tokenizer,
      info=bundle.info, dtype=dtype, mesh=mesh, rules=rules,
      device=device,
    )  # fmt: skip
    with ThreadPoolExecutor(1) as beside:
      compiled = beside.submit(model.compile, **ahead) if ahead is not None else None
      model.params = read()
    model._identity = bundle.identity
    if compiled is not None:
      compiled.result()
    model._load_unread = functools.partial(checkpoint.load_unread, resolve_path(path))
    return model

  @property
  def params(self) -> Any:
    """Its parameters. Others of the same shapes can be assigned; nothing is compiled again."""
    return self._params

  @params.setter
  def params(self, params: Any) -> None:
    self._identity = ""
    if self.mesh is not None:
      self._params = parallel.place(self.mesh, params, self._rules)
      return
    if self._device is None and (committed := devices.committed_device(params)):
      self.device = committed
      self._placement = Placement(None, committed)
    self._params = devices.device_put(params, self.device)

  @property
  def identity(self) -> str:
    """Of the checkpoint: a digest of parameters, configuration and tokenizer. That of a bundle is
    the bundle's, whatever dtype it is loaded in; that of other parameters is computed when it is
    first needed, which takes a second for each GB. Empty while the parameters are shapes."""
    if self._identity:
      return self._identity
    flat = flatten(self._params)
    if not any(isinstance(x, jax.ShapeDtypeStruct) for x in flat.values()):
      model = self.config.to_dict(), self.tokenizer.model
      self._identity = checkpoint_identity({name: describe(x) for name, x in flat.items()}, *model)
    return self._identity

  @identity.setter
  def identity(self, identity: str) -> None:
    self._identity = identity

  @property
  def origin(self) -> Origin:
    """What its embeddings say of the checkpoint that made them."""
    return Origin(self.identity, str(self.info.get("name", "")))

  def encode(
    self,
    images: ImageSource | Sequence[ImageSource],
    *,
    visual: bool = False,
    max_pixels: int = MAX_PIXELS,
  ) -> ImageEmbedding:
    """Encodes one image or a list of them, each once, whatever will be asked about it.

    Args:
      images: path, bytes, PIL image, or uint8 array [h, w, 3]; see `preprocess.read_image`.
      visual: for visual prompts too (`decode_visual`); nothing else of the result depends on it.
      max_pixels: larger images are refused.

    Raises:
      FileNotFoundError, ValueError, TypeError: as `preprocess.read_image`; nothing is lost.
      ValueError: `visual` with a checkpoint that has no head for it.
    """
    head = self.visual_params() if visual else None
    sources: Any = images if isinstance(images, (list, tuple)) else [images]
    if not sources:
      raise ValueError("no image given; pass a path, bytes, a PIL image or a uint8 array.")
    rows = [self._pixels(source, max_pixels) for source in sources]
    pixels, sizes = (np.stack(part) for part in zip(*rows, strict=True))
    parts = []
    for i in batches(np.arange(len(rows)), IMAGE_BATCHES, self._placement.devices):
      # Visual prompts start from the trunk's map in a program of their own, so that no number of
      # this one depends on them. The map (21 MB an image at the released size) lives until then;
      # computing it again would take the time of all the rest.
      part, features = self._encode_image(self.params, *self._placement.put((pixels[i], sizes[i])))
      if head is not None:
        part = dataclasses.replace(part, visual=self._encode_visual(head, features))
      parts.append(part)
    embedding = take(join(parts), np.arange(len(rows)))
    return dataclasses.replace(embedding, origin=self.origin)

  def encode_text(self, prompts: str | Prompt | Sequence[str | Prompt]) -> TextEmbedding:
    """Encodes the phrase of each prompt; `decode(..., text=)` takes the result, again and again."""
    phrases = [prompt.phrase for prompt in as_prompts(prompts)]
    self.tokenizer.check(phrases)
    tokens = self.tokenizer(phrases)
    cut = batches(np.arange(len(tokens)), TEXT_BATCHES)
    text = join([self._encode_text(self.params, tokens[i]) for i in cut])
    tokens = self._placement.whole(tokens)
    return dataclasses.replace(text, tokens=tokens, origin=self.origin)

  def decode(
    self,
    embedding: ImageEmbedding,
    prompts: str | Prompt | Sequence[str | Prompt],
    image_index: int | Sequence[int] | None = None,
    *,
    text: TextEmbedding | None = None,
    max_detections: int | None = None,
    min_score: float = 0.0,
    memory_budget: float = MEMORY_BUDGET,
  ) -> Detections:
    """Finds what the prompts name: any number of prompts over any number of encoded images.

    Args:
      embedding: of one or several images.
      prompts: phrases, or `Prompt`s; mixed as you like.
      image_index: row of the embedding for each prompt; one number for all of them; None when the
        embedding has one image.
      text: `encode_text(prompts)`, when it is at hand; else it is computed, once a distinct phrase.
      max_detections: keep the best so many of each prompt, in descending order; None keeps all
        queries in their order.
      min_score: a prompt without any score above it gets no masks made, which saves a fifth of
        its work: its masks are all 0, and `.instances()` refuses a threshold that would need them.
      memory_budget: bytes that all masks together may take on the device. Larger ones are collected
        in the host's memory, as NumPy arrays, where those that `min_score` leaves out take nothing.

    Returns:
      One row a prompt, in the prompts' order, on the device but for masks over the budget.
      `.instances()` thresholds them. Masks take 66 MB a prompt in float32 at the released size:
      `max_detections` makes it less.

    Raises:
      ValueError: no prompt, a box outside its image, an image that is not there, a score outside
        [0, 1], an embedding or a text of another checkpoint, a text of other prompts, or more masks
        than the host has room for either, before any work unless there is a min_score: those of 300
        prompts take 20 GB in float32 at the released size.
      TypeError: what should be an embedding, a prompt or encoded text is something else.
    """
    if not isinstance(embedding, ImageEmbedding):
      raise TypeError(f"decode takes what encode returns, then prompts; got {type(embedding)}.")
    embedding = dataclasses.replace(embedding, visual=None)  # another structure: another program
    embedding = own_embedding(embedding, self.origin, self.config, self.dtype)
    embedding = self._placement.keep(embedding)
    prompts = as_prompts(prompts)
    images = image_indices(image_index, len(prompts), len(embedding))
    sizes = np.asarray(embedding.sizes)[images]
    for prompt, size in zip(prompts, sizes, strict=True):
      check_boxes(prompt, *size.tolist())
    _check_options(max_detections, min_score)
    kept = min(max_detections or self.config.queries, self.config.queries)
    room = self._room(len(prompts), kept, embedding.fine.shape[1:3], memory_budget)
    if not min_score:
      room.reserve(len(prompts))
    text, phrase = self._text(text, prompts)
    first_ids = 1 + self.config.queries * ordinals(images)

    def ask(batch: np.ndarray) -> tuple[ImageEmbedding, Prompts]:
      sources, source = np.unique(images[batch], return_inverse=True)
      if len(sources) > 1 or self.mesh:  # one row a prompt: the batch's size, not a new shape
        sources, source = images[batch], self._placement.own_rows(len(batch))
      packed = pack(
        [prompts[i] for i in batch], sizes[batch],
        image=source.astype(np.int32), first_id=first_ids[batch], text=take(text, phrase[batch]),
      )  # fmt: skip
      return self._placement.put((take(embedding, sources), packed))

    about = self._placement.whole(images.astype(np.int32))
    limits, whole = np.full(len(prompts), min_score, np.float32), None
    for batch in self._prompt_batches(images):
      for part, chosen in self._parts(*ask(batch), max_detections, min_score):
        part, rows = distinct(part, batch[chosen])
        if isinstance(part, Detections):
          limits[rows] = 0  # these have masks
          whole = part if room.is_whole(rows) else None
        if whole is None:
          room.put(part, rows)
    found = Detections(**room.arrays | {"image_index": about}) if whole is None else whole
    limits = self._placement.whole(limits) if min_score else None
    return dataclasses.replace(found, image_index=about, mask_min_score=limits)

  def _text(
    self, text: TextEmbedding | None, prompts: Sequence[Prompt]
  ) -> tuple[TextEmbedding, np.ndarray]:
    """Encoded phrases as the programs take them, and which row of them is each prompt's."""
    if text is not None:
      text = own_text(text, prompts, self.tokenizer, self.origin, self.dtype)
      return self._placement.keep(text), np.arange(len(prompts))
    phrases = list(dict.fromkeys(prompt.phrase for prompt in prompts))
    text = dataclasses.replace(self.encode_text(phrases), tokens=None, origin=Origin())
    return text, np.array([phrases.index(prompt.phrase) for prompt in prompts])

  def _parts(
    self,
    embedding: ImageEmbedding,
    prompts: Prompts,
    max_detections: int | None,
    min_score: float,
  ) -> Iterator[tuple[Detections | Scored, np.ndarray]]:
    """What is found for a batch, and for which of its rows."""
    every, places = np.arange(len(prompts)), self._placement.places(len(prompts))
    detect, score, mask = self._programs(len(prompts))
    if not min_score:
      yield detect(self.params, embedding, prompts, max_detections), every
      return
    scored = score(self.params, embedding, prompts, max_detections)
    yield scored, every
    promising = np.flatnonzero(np.asarray(scored.scores).max(axis=1) > min_score)
    for rows in batches(promising, prompts_at_once(), places):
      part, seen = take(scored, rows), embedding
      if len(embedding) > 1:
        seen = take(embedding, rows)
        part = dataclasses.replace(part, image_index=self._placement.own_rows(len(rows)))
      yield mask(self.params, *self._placement.put((seen, part))), rows

  def _room(self, prompts: int, kept: int, grid: tuple[int, ...], budget: float) -> Room:
    """For the detections of so many prompts, whose masks have so many cells."""
    names = [field.name for field in dataclasses.fields(Detections)]
    names.remove("mask_min_score")
    masks = {
      "mask_logits": jax.ShapeDtypeStruct((prompts, kept, *grid), self.dtype),
      "semantic_logits": jax.ShapeDtypeStruct((prompts, *grid), self.dtype),
    }
    return Room(names, masks, budget, self.device)

  def compile(
    self,
    images: int = 1,
    prompts: int = 1,
    *,
    boxes: int = 0,
    max_detections: int | None = None,
  ) -> list[Program]:
    """Compiles ahead what `encode` of so many images and `decode` of so many prompts about one of
    them need, so that the first calls need not; several programs side by side.

    Args:
      images, prompts: their numbers; 0 leaves the part out.
      boxes: the most of a prompt.
      max_detections: as it will be given to `decode`.

    Returns:
      What the compiler says of each program.

    Raises:
      ValueError: no whole number from 0, or more boxes than a prompt takes.
    """
    counts = images, prompts, boxes
    if not all(map(is_whole, counts)) or min(counts) < 0:
      raise ValueError(
        f"images, prompts and boxes must be integers and must be 0 or more; got {counts!r:.60}. "
        "Use 0 to leave a part out."
      )
    return programs(
      self,
      images=lengths(batches(np.arange(images), IMAGE_BATCHES, self._placement.devices)),
      phrases=lengths(batches(np.arange(prompts), TEXT_BATCHES)),
      prompts=lengths(self._prompt_batches(np.zeros(prompts, int))),
      boxes=boxes,
      max_detections=max_detections,
    )

  def decode_visual(
    self,
    embedding: ImageEmbedding,
    prompts: VisualPrompt | Sequence[VisualPrompt],
    image_index: int | Sequence[int] | None = None,
    *,
    multimask: bool = True,
    memory_budget: float = MEMORY_BUDGET,
  ) -> VisualMasks:
    """Segments what points, a box or an earlier mask point at: an object a prompt.

    Args:
      embedding: of one or several images, encoded with `visual=True`.
      prompts: any number of them.
      image_index: as in `decode`.
      multimask: three masks a prompt, as one point may mean a part, a whole or a group; else one,
        which is the best for a box or several points.
      memory_budget: as in `decode`.

    Returns:
      One row a prompt, in the prompts' order, on the device but for masks over the budget.
      `.masks()` has them over the source image; any of them can be the `mask` of the next prompt.
      A mask takes 332 kB in float32 at the released size.

    Raises:
      ValueError: no prompt, a point or a box outside its image, a mask of another size, an image
        that is not there or was encoded without `visual=True` or by another checkpoint, a
        `multimask` that is no bool, or a checkpoint without the head.
      TypeError: what should be an embedding or a prompt is something else.
    """
    head = self.visual_params()
    if not isinstance(embedding, ImageEmbedding):
      raise TypeError(
        "decode_visual takes what encode(images, visual=True) returns, then prompts; "
        f"got {embedding!r:.60}."
      )
    if embedding.visual is None:
      raise ValueError(
        "the embedding was made without visual prompts in mind; encode(images, visual=True)."
      )
    embedding = own_embedding(embedding, self.origin, self.config, self.dtype)
    visual = self._placement.keep(embedding.visual)
    multimask = check_flag("multimask", multimask)
    prompts = as_visual_prompts(prompts)
    images = image_indices(image_index, len(prompts), len(embedding))
    sizes = np.asarray(embedding.sizes)[images]
    for prompt, size in zip(prompts, sizes, strict=True):
      check_visual(prompt, *size.tolist(), mask_size=self.config.mask_size)
      if prompt.mask is not None and not prompt.mask.any():
        raise ValueError(
          "the mask of a prompt is 0 everywhere, as masks are that decode(min_score=...) did not "
          "make: pass the logits of a mask that was made."
        )

    names, side = [field.name for field in dataclasses.fields(VisualMasks)], self.config.mask_size
    shape = len(prompts), READINGS if multimask else 1, side, side
    masks = {"mask_logits": jax.ShapeDtypeStruct(shape, self.dtype)}
    room = Room(names, masks, memory_budget, self.device)
    room.reserve(len(prompts))
    for batch in batches_by_image(images, VISUAL_BATCHES, self._placement.devices):
      sources, source = np.unique(images[batch], return_inverse=True)
      if len(sources) > 1:
        sources, source = images[batch], self._placement.own_rows(len(batch))
      else:  # what the prompts share is then computed once on each device
        sources = sources.repeat(self._placement.devices)
      packed = pack_visual([prompts[i] for i in batch], sizes[batch], source.astype(np.int32))
      seen, asked = self._placement.put((take(visual, sources), packed))
      logits, iou, there = self._decode_visual(head, seen, asked, multimask)
      about = self._placement.whole((images[batch].astype(np.int32), sizes[batch]))
      part, places = distinct(VisualMasks(logits, iou, there, *about), batch)
      if room.is_whole(places):
        return part
      room.put(part, places)
    return VisualMasks(**room.arrays)

  def generate_masks(
    self,
    image: ImageSource,
    options: "MaskGeneration | None" = None,
    *,
    max_pixels: int = MAX_PIXELS,
  ) -> "Segments":
    """Segments everything in one image, by a grid of clicks.

    Args:
      image: path, bytes, PIL image, or uint8 array [h, w, 3]; see `preprocess.read_image`.
      options: `MaskGeneration(points_per_side=16, ...)`; None for those of SAM 2.
      max_pixels: larger images are refused.

    Returns:
      What was found, best first: `Instances` with the stability of each, and the click and the crop
      that it came from.

    Raises:
      FileNotFoundError, ValueError, TypeError: as `encode` with `visual=True`.
    """
    from sam3_jax.inference import (
      mask_generator,  # a method for the user's sake: it uses what stands above
    )

    return mask_generator.generate_masks(self, image, options, max_pixels=max_pixels)

  @property
  def compilations(self) -> int:
    """How often the detector has been compiled for `decode` so far, from jit's own cache: at most 6
    programs for each value of max_detections, and 12 others where there is a min_score. (Putting
    results together takes a trivial program more for each new number of prompts.)"""
    programs: list[Any] = [self._detect, self._score, self._mask, *self._few]
    return sum(program._cache_size() for program in programs)

  @property
  def visual_compilations(self) -> int:
    """Likewise for `decode_visual`: at most 5 programs (batches of one image or of several) for
    each of 3 numbers of points, with and without a mask, and each value of multimask."""
    program: Any = self._decode_visual
    return program._cache_size()

  def visual_params(self) -> dict[str, Any]:
    """The part of the parameters that visual prompts need; raises ValueError if it is missing."""
    if checkpoint.VISUAL not in self.params:
      raise ValueError(
        "this checkpoint has no head for visual prompts (points, boxes, masks); convert the "
        "released weights, facebook/sam3 or sam3.pt, with `sam3-jax convert`."
      )
    return {checkpoint.VISUAL: self.params[checkpoint.VISUAL]}

  def __getstate__(self) -> dict[str, Any]:
    if self.mesh is not None:
      raise TypeError(
        "a model with a mesh cannot be pickled, as its devices are those of this process: pass the "
        "checkpoint's path, and call Sam3.from_checkpoint(path, mesh=make_mesh()) there."
      )
    shapes = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(self._params))
    return {
      "config": self.config,
      "params": self._params if shapes else jax.device_get(self._params),
      "tokenizer": self.tokenizer,
      "info": self.info,
      "dtype": self.dtype.name,
      "device": self._device and self._device.platform,
      "identity": self._identity,
      "load_unread": self._load_unread,
    }

  def __setstate__(self, state: dict[str, Any]) -> None:
    state = dict(state)
    identity, load_unread = state.pop("identity"), state.pop("load_unread")
    try:
      _check_place(state["device"], None)
    except ValueError:  # this process has none of that platform
      state["device"] = None
    self.__init__(state.pop("config"), state.pop("params"), state.pop("tokenizer"), **state)
    self._identity, self._load_unread = identity, load_unread

  def __copy__(self) -> "Sam3":
    """Shares the parameters; compiles its own programs."""
    again = Sam3(
      self.config, self._params, self.tokenizer,
      info=self.info, dtype=self.dtype, mesh=self.mesh, rules=self._rules, device=self._device,
    )  # fmt: skip
    again._identity, again._load_unread = self._identity, self._load_unread
    return again

  def __deepcopy__(self, memo: dict[int, Any]) -> "Sam3":
    """Likewise, as nothing changes an array; with its own `info` and tree of parameters."""
    again = self.__copy__()
    again.info = copy.deepcopy(self.info, memo)
    return again

  def save(self, path: str | Path) -> None:
    """Writes a bundle that `from_checkpoint` reads.

    What the bundle of `from_checkpoint` keeps for the way back to other programs is copied from its
    folder, which must still be there.

    Raises:
      FileNotFoundError: it is not.
      ValueError: as `checkpoint.save`.
    """
    kept = {"info": self.info, "unread": self._load_unread()}
    checkpoint.save(path, self.params, self.config, self.tokenizer.model, **kept)

  def _prompt_batches(self, images: np.ndarray) -> Iterator[np.ndarray]:
    return self._placement.prompt_batches(images, prompts_at_once())

  def _programs(self, prompts: int) -> list[Any]:
    """What detects, scores, and makes masks, in batches of so many."""
    few = self._placement.shares(prompts)
    return self._few if few else [self._detect, self._score, self._mask]

  def _pixels(
    self, source: ImageSource, max_pixels: int
  ) -> tuple[UInt8[np.ndarray, "Hi Wi 3"], Int[np.ndarray, "2"]]:
    image = read_image(source, max_pixels=max_pixels)
    return resize(image, self.config.image_size), np.array(image.shape[:2], np.int32)


def prompts_at_once() -> tuple[int, ...]:
  """Sizes of batches of prompts about one image; those over several images have the first of them.
  A prompt fills a CPU, where four together take up to 1.4 times as long as one after the other."""
  return (1,) if jax.default_backend() == "cpu" else (4, 1)


def default_dtype(device: Any = None) -> str:
  """bfloat16 where the hardware multiplies it faster, float32 on a CPU; None for JAX's default."""
  platform = device.platform if device else jax.default_backend()
  return "float32" if platform == "cpu" else "bfloat16"


def _check_place(device: Any, mesh: Mesh | None) -> Any:
  """The device, if one is given; raises ValueError of one beside a mesh, or of another process."""
  if mesh is None:
    return None if device is None else devices.find_device(device)
  if device is not None:
    raise ValueError(f"device={device!s:.60} and a mesh exclude each other; give one of them.")
  devices.check_mesh(mesh)
  return None


def _check_options(max_detections: int | None, min_score: float) -> None:
  if max_detections is not None and not (is_whole(max_detections) and max_detections > 0):
    raise ValueError(f"max_detections must be 1, 2, .. or None for all; got {max_detections!r}.")
  if not (is_number(min_score) and 0 <= min_score <= 1):
    raise ValueError(f"min_score must be in [0, 1]; got {min_score!r}. Use 0 for all masks.")
