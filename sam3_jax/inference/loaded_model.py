"""The model behind `Sam3`: parameters, configuration and tokenizer on a device or a mesh."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh

from sam3_jax.checkpoint import bundle
from sam3_jax.checkpoint.parameters import why_no_tracker
from sam3_jax.config import Config
from sam3_jax.inference.batch_sharding import BatchSharding
from sam3_jax.inference.programs import Programs
from sam3_jax.inference.sharding import REPLICATED, PartitionRules, shard_params
from sam3_jax.inputs.tokenizer import Tokenizer
from sam3_jax.utils import devices
from sam3_jax.utils.identity import Origin, checkpoint_identity
from sam3_jax.utils.param_tree import describe, flatten


class LoadedModel:
  """A checkpoint on its devices, with its jitted functions.

  Attributes:
    config: sizes of the model.
    params: pytree of its parameters.
    tokenizer: converts phrases to token ids.
    info: the checkpoint's name, source, licence, and whether it is trained.
    dtype: of the computation.
    mesh: devices of the computation; None for one device.
    device: device of the computation; None with a mesh.
    programs: the jitted functions.
    identity: digest of the checkpoint's parameters, configuration and tokenizer.

  A model can be copied, and pickled unless it has a mesh. Pickles hold the parameters as NumPy
  arrays. Unpickling puts them on the default device, or on the first device of the platform of
  `device` if that was given.
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
    rules: PartitionRules = REPLICATED,
    device: Any = None,
  ):
    """Creates a model from parameters, such as the random ones of `model.sam3.init`.

    Args:
      config: sizes of the model.
      params: pytree of arrays with the shapes of `model.sam3.parameter_shapes(config)`, and, for
        visual prompts, a part `visual` with those of `visual.head.parameter_shapes(config)`, and
        for tracking, a part `video` with those of `video.tracker.parameter_shapes(config)`. To
        compile only, `jax.ShapeDtypeStruct`s with shardings.
      tokenizer: converts phrases to token ids.
      info: metadata that `save` writes.
      dtype: "float32" or "bfloat16"; None for bfloat16 on TPU and GPU, float32 on CPU.
      mesh: from `sharding.make_mesh`; shards images and prompts over its devices.
      rules: how the mesh shards the parameters; replicated by default.
      device: a `jax.Device` or a platform such as "cpu"; None for the device that the parameters
        are committed to, else `jax.default_device`, else the first device of this process.

    Raises:
      ValueError: both a device and a mesh, a device that does not exist, or one of another process.
    """
    self.config, self.tokenizer, self.mesh, self._rules = config, tokenizer, mesh, rules
    self._device = check_device(device, mesh)
    self.device = None if mesh is not None else self._device or devices.default_device()
    self._sharding = BatchSharding(mesh, self.device)
    self.params = params
    self.info = dict(info or {})
    self._load_unread: Callable[[], Mapping[str, np.ndarray]] = dict
    self.dtype = bundle.check_dtype(default_dtype(self.platform) if dtype is None else dtype)
    self.programs = Programs(config, self.dtype, mesh, rules)

  @property
  def params(self) -> Any:
    """Its parameters. Assigning others of the same shapes compiles nothing again."""
    return self._params

  @params.setter
  def params(self, params: Any) -> None:
    self._identity = ""
    if self.mesh is not None:
      self._params = shard_params(self.mesh, params, self._rules)
      return
    if self._device is None and (committed := devices.committed_device(params)):
      self.device = committed
      self._sharding = BatchSharding(None, committed)
    self._params = devices.device_put(params, self.device)

  @property
  def platform(self) -> str:
    """The kind of the model's devices, such as "cpu" or "tpu"; not always that of JAX's default."""
    device: Any = self.device if self.mesh is None else self.mesh.devices.flat[0]
    return device.platform

  @property
  def identity(self) -> str:
    """Digest of the checkpoint's parameters, configuration and tokenizer.

    A bundle has the same identity in every dtype. The identity of other parameters is computed when
    it is first needed, in a second per GB. It is empty while the parameters are shapes.
    """
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
    """The checkpoint, as its embeddings name it."""
    return Origin(self.identity, str(self.info.get("name", "")))

  def visual_params(self) -> dict[str, Any]:
    """The part of the parameters for visual prompts; raises ValueError if there is none."""
    if bundle.VISUAL not in self.params:
      raise ValueError(
        "this checkpoint has no head for visual prompts (points, boxes, masks); convert the "
        "released weights, facebook/sam3 or sam3.pt, with `sam3-jax convert`."
      )
    return {bundle.VISUAL: self.params[bundle.VISUAL]}

  def video_params(self) -> dict[str, Any]:
    """The parts of the parameters for tracking; raises ValueError if there is no tracker."""
    if bundle.VIDEO not in self.params or self.config.video is None:
      name = str(self.info.get("name") or "this checkpoint")
      raise ValueError(f"{name} cannot track objects: {why_no_tracker(self._load_unread())}.")
    return self.visual_params() | {bundle.VIDEO: self.params[bundle.VIDEO]}

  def __getstate__(self) -> dict[str, Any]:
    if self.mesh is not None:
      raise TypeError(
        "a model with a mesh cannot be pickled, as its devices belong to this process: pass the "
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
      check_device(state["device"], None)
    except ValueError:  # this process has no device of that platform
      state["device"] = None
    self.__init__(state.pop("config"), state.pop("params"), state.pop("tokenizer"), **state)
    self._identity, self._load_unread = identity, load_unread

  def __copy__(self) -> Self:
    """Shares the parameters; compiles its own programs."""
    copied = type(self)(
      self.config, self._params, self.tokenizer,
      info=self.info, dtype=self.dtype, mesh=self.mesh, rules=self._rules, device=self._device,
    )  # fmt: skip
    copied._identity, copied._load_unread = self._identity, self._load_unread
    return copied

  def __deepcopy__(self, memo: dict[int, Any]) -> Self:
    """Shares the arrays, too, which are immutable; copies `info` and the tree of parameters."""
    copied = self.__copy__()
    copied.info = copy.deepcopy(self.info, memo)
    return copied

  def save(self, path: str | Path) -> None:
    """Writes a checkpoint that `from_checkpoint` reads.

    Copies the tensors that the loaded checkpoint keeps for export to other layouts; its directory
    must still exist.

    Raises:
      FileNotFoundError: it does not.
      ValueError: as `bundle.save`.
    """
    kept = {"info": self.info, "unread": self._load_unread()}
    bundle.save(path, self.params, self.config, self.tokenizer.model, **kept)


def default_dtype(platform: str) -> str:
  """bfloat16, or float32 on a CPU, which does not multiply bfloat16 faster."""
  return "float32" if platform == "cpu" else "bfloat16"


def check_device(device: Any, mesh: Mesh | None) -> Any:
  """The device, if given; raises ValueError for a device and a mesh, or for another process's."""
  if mesh is None:
    return None if device is None else devices.find_device(device)
  if device is not None:
    raise ValueError(f"device={device!s:.60} and a mesh exclude each other; give one of them.")
  devices.check_mesh(mesh)
  return None
