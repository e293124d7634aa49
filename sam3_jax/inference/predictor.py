"""`Sam3`: a checkpoint with methods to encode images and decode prompts.

JAX compiles a program for each shape of its inputs. Images, phrases and prompts are therefore split
into batches of the few sizes below, which need no padding.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, UInt8

from sam3_jax.checkpoint import bundle
from sam3_jax.inference import mask_generator
from sam3_jax.inference.aot import Program, compile_programs
from sam3_jax.inference.batching import batch_sizes, batches, join, take
from sam3_jax.inference.concepts import ConceptDecoder, ConceptRequest, encode_concept
from sam3_jax.inference.loaded_model import check_device, default_dtype
from sam3_jax.inference.mask_generator import MaskGeneration, Segments
from sam3_jax.inference.provenance import own_concept, own_embedding, own_text
from sam3_jax.inference.sharding import REPLICATED, PartitionRules, parameter_sharding
from sam3_jax.inference.tiled import TiledModel
from sam3_jax.inference.video.video_model import VideoModel
from sam3_jax.inference.visual import VisualRequest, decode_visual
from sam3_jax.inputs.concept import Concept, check_exemplars, padded_slots
from sam3_jax.inputs.preprocess import MAX_PIXELS, ImageSource, read_image, resize
from sam3_jax.inputs.prompts import (
  ConceptPrompt,
  Prompt,
  as_concept_prompts,
  as_prompts,
  image_indices,
)
from sam3_jax.inputs.tokenizer import Tokenizer
from sam3_jax.inputs.visual_prompts import VisualPrompt, as_visual_prompts
from sam3_jax.outputs.detections import Detections, VisualMasks
from sam3_jax.registry import find_checkpoint
from sam3_jax.types import ImageEmbedding, TextEmbedding
from sam3_jax.utils import devices
from sam3_jax.utils.identity import Origin
from sam3_jax.utils.paths import resolve_path
from sam3_jax.utils.validation import check_flag, is_whole

IMAGE_BATCHES = (4, 1)
TEXT_BATCHES = (16, 4, 1)
MEMORY_BUDGET = 4_000_000_000  # bytes: all masks of 59 prompts of the released model in float32


class Sam3(TiledModel, VideoModel):
  """SAM 3: encode an image once, then decode many prompts; track objects through videos.

  Prompts are concepts (`decode`, `segment_tiled`), or points, boxes and masks of single objects
  (`decode_visual`, `track`, `video`).
  `LoadedModel` lists the attributes and the arguments of the constructor.
  """

  @classmethod
  def from_checkpoint(
    cls,
    path: str | Path,
    *,
    dtype: str | None = None,
    verify: bool = False,
    mesh: Mesh | None = None,
    rules: PartitionRules = REPLICATED,
    device: Any = None,
    ahead: Mapping[str, Any] | None = None,
    progress: Callable[[str, float], None] | None = None,
  ) -> "Sam3":
    """Loads a checkpoint.

    Args:
      path: a directory, the name of a checkpoint such as "sam3-tiny", `gs://bucket/path`, or
        `hf://org/name`; see `find_checkpoint`.
      dtype: "float32" or "bfloat16"; None for bfloat16 on TPU and GPU, float32 on CPU.
      verify: compares the checksums of all files first; those of small files are always compared.
      mesh, rules: as in `Sam3`; each device reads only its own parameters.
      device: a `jax.Device` or a platform such as "cpu"; None for `jax.default_device`, if it is
        set, else the first device of this process.
      ahead: arguments of `compile`, such as `{"images": 1, "prompts": 4}`, to compile these
        programs while the parameters are read.
      progress: as in `bundle.load`.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: it is not a checkpoint, or is damaged, and the message names the first fault; or
        the device or the mesh cannot be used.
    """
    path = find_checkpoint(path, progress=progress)
    target = check_device(device, mesh) or devices.default_device()
    platform = (target if mesh is None else mesh.devices.flat[0]).platform
    dtype = default_dtype(platform) if dtype is None else dtype
    sharding: Any = jax.sharding.SingleDeviceSharding(target)
    if mesh is not None:
      sharding = parameter_sharding(mesh, rules)
    loaded, read = bundle.begin(
      path, dtype=dtype, verify=verify, sharding=sharding, progress=progress
    )
    tokenizer = Tokenizer(loaded.tokenizer, context=loaded.config.text.context)
    model = cls(
      loaded.config, loaded.params, tokenizer,
      info=loaded.info, dtype=dtype, mesh=mesh, rules=rules, device=device,
    )  # fmt: skip
    with ThreadPoolExecutor(1) as pool:
      compiled = pool.submit(model.compile, **ahead) if ahead is not None else None
      model.params = read()
    model._identity = loaded.identity
    if compiled is not None:
      compiled.result()
    model._load_unread = functools.partial(bundle.load_unread, resolve_path(path))
    return model

  def encode(
    self,
    images: ImageSource | Sequence[ImageSource],
    *,
    visual: bool = False,
    max_pixels: int = MAX_PIXELS,
  ) -> ImageEmbedding:
    """Encodes one image or a list of images, each once for all prompts.

    Args:
      images: path, bytes, PIL image, or uint8 array [h, w, 3]; see `preprocess.read_image`.
      visual: also encodes for visual prompts (`decode_visual`); the rest of the result is the same.
      max_pixels: refuses larger images.

    Raises:
      FileNotFoundError, ValueError, TypeError: as `preprocess.read_image`.
      ValueError: `visual` with a checkpoint that has no head for visual prompts.
    """
    if visual:
      self.visual_params()  # raises before any image is read
    sources: Any = images if isinstance(images, (list, tuple)) else [images]
    if not sources:
      raise ValueError("no image given; pass a path, bytes, a PIL image or a uint8 array.")
    loaded = [self._pixels(source, max_pixels) for source in sources]
    pixels, sizes = (np.stack(part) for part in zip(*loaded, strict=True))
    return self.encode_resized(pixels, sizes, visual=visual)

  def encode_resized(
    self,
    pixels: UInt8[np.ndarray, "B Hi Wi 3"],
    sizes: Int[np.ndarray, "B 2"],
    *,
    visual: bool = False,
  ) -> ImageEmbedding:
    """Encodes images that were read and resized elsewhere, such as in another process.

    Args:
      pixels: from `preprocess.read_image` and `resize`, of the model's size.
      sizes: height and width of the source images.
      visual: as in `encode`.

    Raises:
      ValueError: `visual` with a checkpoint that has no head for visual prompts.
    """
    head = self.visual_params() if visual else None
    parts = []
    for i in batches(np.arange(len(pixels)), IMAGE_BATCHES, self._sharding.devices):
      # The second neck is a program of its own, so that it cannot change a number of the first. Its
      # input, the trunk's map (21 MB per image at the released size), is kept between them, as
      # computing it again would take as long as all the rest.
      part, features = self.programs.encode(self.params, *self._sharding.put((pixels[i], sizes[i])))
      if head is not None:
        part = dataclasses.replace(part, visual=self.programs.encode_visual(head, features))
      parts.append(part)
    embedding = take(join(parts), np.arange(len(pixels)))
    return dataclasses.replace(embedding, origin=self.origin)

  def encode_text(
    self, prompts: str | ConceptPrompt | Sequence[str | ConceptPrompt]
  ) -> TextEmbedding:
    """Encodes the phrases of prompts, for repeated use as `decode(..., text=)`."""
    phrases = [prompt.phrase for prompt in as_concept_prompts(prompts)]
    self.tokenizer.check(phrases)
    tokens = self.tokenizer(phrases)
    split = batches(np.arange(len(tokens)), TEXT_BATCHES)
    text = join([self.programs.encode_text(self.params, tokens[i]) for i in split])
    return dataclasses.replace(text, tokens=self._sharding.replicate(tokens), origin=self.origin)

  def concept(
    self,
    embedding: ImageEmbedding,
    prompts: Prompt | Sequence[Prompt],
    image_index: int | Sequence[int] | None = None,
  ) -> Concept:
    """Encodes the exemplar boxes of prompts, to find the same concept in other images.

    `decode` takes the result like a prompt, for any image. SAM 3 was trained with exemplars in the
    image itself; the guide to concepts says how much worse exemplars of other images are.

    Args:
      embedding: one or several images.
      prompts: with boxes. Several prompts make one concept with the exemplars of all.
      image_index: as in `decode`, the image of each prompt.

    Returns:
      The exemplars and the phrase of the prompts. `save` and `load` keep it in a file, and
      `Concept.join` joins several.

    Raises:
      ValueError: a prompt without a box, different phrases, a box outside its image, more than 128
        boxes, an invalid image index, or an embedding of another checkpoint.
      TypeError: an argument of the wrong type.
    """
    if not isinstance(embedding, ImageEmbedding):
      raise TypeError(f"concept takes what encode returns, then prompts; got {type(embedding)}.")
    embedding = own_embedding(embedding, self.origin, self.config, self.dtype)
    prompts = as_prompts(prompts)
    images = image_indices(image_index, len(prompts), len(embedding))
    self.tokenizer.check(prompt.phrase for prompt in prompts)
    concept = encode_concept(self.programs, self.params, self._sharding, embedding, prompts, images)
    return dataclasses.replace(concept, origin=self.origin)

  def decode(
    self,
    embedding: ImageEmbedding,
    prompts: str | ConceptPrompt | Sequence[str | ConceptPrompt],
    image_index: int | Sequence[int] | None = None,
    *,
    text: TextEmbedding | None = None,
    max_detections: int | None = None,
    min_score: float = 0.0,
    memory_budget: float = MEMORY_BUDGET,
  ) -> Detections:
    """Detects all instances of concepts, for any number of prompts and encoded images.

    Args:
      embedding: one or several images.
      prompts: phrases, `Prompt`s and `Concept`s, in any mixture.
      image_index: row of the embedding for each prompt, or one number for all prompts; None if the
        embedding has one image.
      text: the result of `encode_text(prompts)`; None encodes each distinct phrase once.
      max_detections: keeps at most N queries of each prompt, in descending order of their scores;
        None keeps all queries in their order.
      min_score: skips the masks of prompts without a score above it, a fifth of their work. Their
        masks are all 0, and `.instances()` refuses a threshold that would need them.
      memory_budget: bytes that all masks together may take on the device. Beyond it they are NumPy
        arrays on the host, where skipped masks use no memory.

    Returns:
      One row per prompt, in order, on the device except masks beyond the budget. `.instances()`
      applies a threshold. Masks take 66 MB per prompt in float32 at the released size, and less
      with `max_detections`.

    Raises:
      ValueError: no prompt, a box outside its image, an invalid image index, a score outside
        [0, 1], an embedding, a concept or text of another checkpoint, text of other prompts, or
        masks too large even for the host's memory. Without `min_score`, the last one is raised
        before any computation: the masks of 300 prompts take 20 GB in float32 at the released size.
      TypeError: an argument of the wrong type.
    """
    if not isinstance(embedding, ImageEmbedding):
      raise TypeError(f"decode takes what encode returns, then prompts; got {type(embedding)}.")
    # `visual` changes the structure of the pytree, for which JAX would compile another program.
    embedding = dataclasses.replace(embedding, visual=None)
    embedding = own_embedding(embedding, self.origin, self.config, self.dtype)
    prompts = [
      own_concept(one, self.origin, self.config, self.dtype) if isinstance(one, Concept) else one
      for one in as_concept_prompts(prompts)
    ]
    images = image_indices(image_index, len(prompts), len(embedding))
    request = ConceptRequest(
      embedding=self._sharding.commit(embedding),
      prompts=prompts,
      images=images,
      sizes=np.asarray(embedding.sizes)[images],
      max_detections=max_detections,
      min_score=min_score,
    )
    buffer = request.buffer(self.programs, memory_budget, self.device)
    text, text_rows = self._text(text, prompts)
    decoder = ConceptDecoder(
      self.programs, self.params, self._sharding, prompts_at_once(self.platform)
    )
    return decoder.decode(request, text, text_rows, buffer)

  def _text(
    self, text: TextEmbedding | None, prompts: Sequence[ConceptPrompt]
  ) -> tuple[TextEmbedding, np.ndarray]:
    """Encoded phrases as the programs take them, and the row of each prompt."""
    if text is not None:
      text = own_text(text, prompts, self.tokenizer, self.origin, self.dtype)
      return self._sharding.commit(text), np.arange(len(prompts))
    rows: dict[str, int] = {}
    own = np.array([rows.setdefault(prompt.phrase, len(rows)) for prompt in prompts])
    text = dataclasses.replace(self.encode_text(list(rows)), tokens=None, origin=Origin())
    return text, own

  def compile(
    self,
    images: int = 1,
    prompts: int = 1,
    *,
    boxes: int = 0,
    exemplars: Sequence[int] = (),
    max_detections: int | None = None,
  ) -> list[Program]:
    """Compiles the programs of `encode` and `decode` before the first calls, in parallel.

    Args:
      images: number of images of `encode`; 0 leaves it out.
      prompts: number of prompts of `decode`, of one image; 0 leaves it out.
      boxes: the largest number of boxes of a prompt.
      exemplars: for concepts of `decode`, of one image: the number of exemplars of each.
      max_detections: as in `decode`.

    Returns:
      What the compiler reports of each program.

    Raises:
      ValueError: a number that is not an integer from 0, or more boxes or exemplars than a prompt
        takes.
    """
    counts = images, prompts, boxes, *exemplars
    if not all(map(is_whole, counts)) or min(counts) < 0:
      raise ValueError(
        "images, prompts, boxes and exemplars must be integers and must be 0 or more; got "
        f"{counts!r:.60}. "
        "Use 0 to leave a part out."
      )
    check_exemplars(max(exemplars, default=0))

    def sizes(count: int) -> list[int]:
      same_image = np.zeros(count, int)
      at_once = prompts_at_once(self.platform)
      return batch_sizes(self._sharding.prompt_batches(same_image, at_once))

    slots = collections.Counter(padded_slots(count) for count in exemplars)
    return compile_programs(
      self.programs,
      self.params,
      images=batch_sizes(batches(np.arange(images), IMAGE_BATCHES, self._sharding.devices)),
      phrases=batch_sizes(batches(np.arange(prompts + len(exemplars)), TEXT_BATCHES)),
      prompts=sizes(prompts),
      concepts=[(size, slot) for slot, count in slots.items() for size in sizes(count)],
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
    """Segments one object for each visual prompt: points, a box, or an earlier mask.

    Args:
      embedding: one or several images, encoded with `visual=True`.
      prompts: any number of them.
      image_index: as in `decode`.
      multimask: returns the three multimask outputs of each prompt, as one point may mean a part,
        a whole or a group. False returns a single mask, which is best for a box or several points.
      memory_budget: as in `decode`.

    Returns:
      One row per prompt, in order, on the device except masks beyond the budget. `.masks()` resizes
      them to the source image. Each can be the `mask` of the next prompt. A mask takes 332 kB in
      float32 at the released size.

    Raises:
      ValueError: no prompt, a point or a box outside its image, a mask of another size, an invalid
        image index, an embedding without `visual=True` or of another checkpoint, a `multimask` that
        is not a bool, or a checkpoint without the head for visual prompts.
      TypeError: an argument of the wrong type.
    """
    head = self.visual_params()
    if not isinstance(embedding, ImageEmbedding):
      raise TypeError(
        "decode_visual takes what encode(images, visual=True) returns, then prompts; "
        f"got {embedding!r:.60}."
      )
    if embedding.visual is None:
      raise ValueError(
        "the embedding was encoded without visual=True; use encode(images, visual=True)."
      )
    embedding = own_embedding(embedding, self.origin, self.config, self.dtype)
    multimask = check_flag("multimask", multimask)
    prompts = as_visual_prompts(prompts)
    images = image_indices(image_index, len(prompts), len(embedding))
    visual: Any = embedding.visual
    request = VisualRequest(
      embedding=self._sharding.commit(visual),
      prompts=prompts,
      images=images,
      sizes=np.asarray(embedding.sizes)[images],
      multimask=multimask,
      mask_size=self.config.mask_size,
    )
    buffer = request.buffer(self.dtype, memory_budget, self.device)
    return decode_visual(self.programs, head, self._sharding, request, buffer)

  def generate_masks(
    self,
    image: ImageSource,
    options: MaskGeneration | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
  ) -> Segments:
    """Segments everything in one image, with a grid of point prompts.

    Args:
      image: path, bytes, PIL image, or uint8 array [h, w, 3]; see `preprocess.read_image`.
      options: `MaskGeneration(points_per_side=16, ...)`; None for SAM 2's defaults.
      max_pixels: refuses larger images.

    Returns:
      `Instances`, best first, with the stability, the point and the crop of each.

    Raises:
      FileNotFoundError, ValueError, TypeError: as `encode` with `visual=True`.
    """
    return mask_generator.generate_masks(self, image, options, max_pixels=max_pixels)

  @property
  def compilations(self) -> int:
    """How many programs `decode` has compiled: at most 6 for each value of max_detections, and 12
    others with a min_score; as many again for concepts. (Joining results takes another trivial
    program for each new number of prompts.)"""
    return self.programs.prompts.compilations + self.programs.split_prompts.compilations

  @property
  def visual_compilations(self) -> int:
    """How many programs `decode_visual` has compiled: at most 5 (batches of one image or of
    several) for each of 3 numbers of points, with and without a mask, and value of multimask."""
    return self.programs.decode_visual._cache_size()

  def _pixels(
    self, source: ImageSource, max_pixels: int
  ) -> tuple[UInt8[np.ndarray, "Hi Wi 3"], Int[np.ndarray, "2"]]:
    image = read_image(source, max_pixels=max_pixels)
    return resize(image, self.config.image_size), np.array(image.shape[:2], np.int32)


def prompts_at_once(platform: str) -> tuple[int, ...]:
  """Sizes of batches of prompts of one image, in descending order.

  One prompt uses all of a CPU: four in a batch take up to 1.4 times as long as one after another.
  """
  return (1,) if platform == "cpu" else (4, 1)
