"""How every array is spread over the mesh: one table for parameters, by path, and one for batches."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from voco_jax.errors import UserError
from voco_jax.parallel.mesh import PARAMS, ROWS, axis_keys, constrain

# Path (of a layer's parameter: without the leading layer axis) to the axes of its dimensions, and the config keys that
# say how long those are; the first that matches. `heads` are query or key/value heads.
RULES = (
    # LoRA's matrices are spread as their kernel's axes are, the rank over nothing
    (r"(q|k|v)_proj\.lora\.lora_b", (None, ("tensor", *PARAMS)), "rank heads"),  # heads·H
    (r"(gate|up)_proj\.lora\.lora_b", (None, ("tensor", *PARAMS)), "rank intermediate_size"),
    (r"(q|k|v|gate|up)_proj\.lora\.lora_a", (PARAMS, None), "hidden_size rank"),
    (r"o_proj\.lora\.lora_a", (("tensor", *PARAMS), None), "heads rank"),  # heads·H
    (r"down_proj\.lora\.lora_a", (("tensor", *PARAMS), None), "intermediate_size rank"),
    (r"(o|down)_proj\.lora\.lora_b", (None, PARAMS), "rank hidden_size"),
    (r"embed_tokens\.embedding", ("tensor", PARAMS), "vocab_multiple hidden_size"),
    (r"embed_tokens\.voco_row", (PARAMS,), "hidden_size"),  # see train/trainable.py
    (r"lm_head\.kernel", (PARAMS, "tensor"), "hidden_size vocab_multiple"),
    (
        r"\b(q|k|v)_proj\.kernel|attention\.(query|key|value)\.kernel",
        (PARAMS, "tensor", None), "hidden_size heads head_dim",
    ),
    (r"\b(q|k|v)_proj\.bias|attention\.(query|key|value)\.bias", ("tensor", None), "heads head_dim"),
    (r"\b(o|out)_proj\.kernel|attention\.out\.kernel", ("tensor", None, PARAMS), "heads head_dim hidden_size"),
    (r"linear_1\.kernel", (PARAMS, "tensor"), "vision.hidden_size hidden_size"),
    (r"linear_\d+\.kernel", ("tensor", PARAMS), "hidden_size hidden_size"),
    (r"(gate_proj|up_proj|fc1)\.kernel", (PARAMS, "tensor"), "hidden_size intermediate_size"),
    (r"linear_1\.bias", ("tensor",), "hidden_size"),
    (r"fc1\.bias", ("tensor",), "intermediate_size"),
    (r"(down_proj|fc2)\.kernel", ("tensor", PARAMS), "intermediate_size hidden_size"),
    (r"compressor\.linear\.kernel", (PARAMS, None), "hidden_size hidden_size"),
    (r"patch_embedding\.kernel", (None, PARAMS), "patch hidden_size"),
    # Small: on every device
    (r"norm|bias|class_embedding|position_embedding|queries|scale|ns_coeffs", (), ""),
)  # fmt: skip

# pixel_values [packs, I, size, size, 3]; everything else is [rows, …] or [packs, …]
BATCH = {"pixel_values": (ROWS, "frame")}


def param_spec(path: str) -> P:
    """The partition spec of a parameter by its dotted path, stacked layers' leading axis included."""
    spec, _ = _rule(path)
    return P(None, *spec) if _in_layers(path) and spec else P(*spec)


def dimension_key(path: str, place: int) -> str:
    """The config key that says how long a dimension of a parameter is, of those that are spread over devices."""
    part = "vision" if re.search(r"\bvision_tower\b", path) else "llama"
    key = _rule(path)[1].split()[place - _in_layers(path)]
    if key == "heads":
        grouped = part == "llama" and re.search(r"\b[kv]_proj\b", path)
        key = "num_key_value_heads" if grouped else "num_attention_heads"
    elif key == "intermediate_size" and re.search(r"\bcompressor\b", path):
        key = "hidden_size"  # of a Q-Former's MLP, which is four times as wide
    return f"config.model.{key}" if "." in key else f"config.model.{part}.{key}"


def _rule(path: str) -> tuple[tuple, str]:
    for pattern, spec, dimensions in RULES:
        if re.search(pattern, path):
            return spec, dimensions
    raise ValueError(f"{path}: no sharding rule for this parameter (voco_jax/parallel/sharding.py)")


def _in_layers(path: str) -> bool:
    return re.search(r"\blayers\.", path) is not None


def param_shardings(mesh: Mesh, params: Any, *, for_use: bool = False) -> Any:
    """A tree of `NamedSharding` for a tree of parameters, or of anything with parameters' paths at its leaves' ends.

    Optimizer state holds trees like the parameters' (moments), scalars (counts), and Adafactor's rows and columns,
    which are small and on every device. UserError for a dimension that its axes do not divide; only `for_use`, without
    training, is a vocabulary that does not divide left on every device.
    """

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if leaf.size == 1 or re.search(r"\bv_(row|col)\b", name):
            return NamedSharding(mesh, P())
        spec = param_spec(name)
        for place, (size, axes) in enumerate(zip(leaf.shape, spec, strict=False)):
            count = _count(mesh, axes)
            if size % count and for_use and axes == "tensor" and re.search("embed_tokens|lm_head", name):
                spec = P(*spec[:place], None, *spec[place + 1 :])
            elif size % count:
                key = dimension_key(name, place)
                hint = " rows; it pads the vocabulary" if key.endswith("vocab_multiple") else ""
                expected = f"expected a multiple of {count}, the devices along {axis_keys(axes)}"
                raise UserError(f"{key}: {name} {list(leaf.shape)}: {expected}; found {size}{hint}")
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, params)


def batch_spec(name: str) -> tuple:
    """The axes of the dimensions of a batch's array by its name; dimensions left out are on every device."""
    return BATCH.get(name, (ROWS,))


def batch_shardings(mesh: Mesh, batch: dict) -> dict[str, NamedSharding]:
    """A `NamedSharding` for each array of a batch; UserError where rows or images do not divide."""

    def sharding(name, array):
        spec = batch_spec(name)
        for size, axes, key in zip(array.shape, spec, ("data.batch_size", "data.images_per_pack"), strict=False):
            if size % (count := _count(mesh, axes)):
                expected = f"expected a multiple of {count}, the devices along {axis_keys(axes)}"
                raise UserError(f"config.{key}: {name} {list(array.shape)}: {expected}; found {size}")
        return NamedSharding(mesh, P(*spec))

    return {name: sharding(name, array) for name, array in batch.items()}


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Which of a batch's elements (packs) this process's devices hold; UserError where they do not divide."""
    batch_shardings(mesh, {"pixel_values": jax.ShapeDtypeStruct((batch_size,), jnp.uint8)})
    indices = NamedSharding(mesh, P(ROWS)).addressable_devices_indices_map((batch_size,))
    slices = [index[0] for index in indices.values() if index is not None]
    return sorted({row for rows in slices for row in range(*rows.indices(batch_size))})


def put_batch(mesh: Mesh, batch: dict, batch_size: int = 0) -> dict[str, jax.Array]:
    """A batch of numpy arrays on the devices. With `batch_size`, the elements of the whole batch, each process has its
    `local_rows` alone."""
    shapes = whole_shapes(batch, batch_size) if batch_size else batch
    return {
        name: jax.make_array_from_process_local_data(sharding, batch[name], shapes[name].shape)
        for name, sharding in batch_shardings(mesh, shapes).items()
    }


def whole_shapes(batch: dict, batch_size: int) -> dict:
    """Shapes of a batch of `batch_size` elements of which one process has some."""
    held = len(batch["pixel_values"])
    return {
        name: jax.ShapeDtypeStruct((len(array) // held * batch_size, *array.shape[1:]), array.dtype)
        for name, array in batch.items()
    }


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Shapes and dtypes with shardings, for restoring into place and for compiling ahead of time."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)


def gather_layer(layer: dict, dtype: Any) -> dict:
    """A layer's parameters as its matrix products want them: kernels and LoRA's cast, then gathered from `PARAMS`.

    Cast first: half the bytes travel. A kernel's gradient is summed and spread again in one reduce-scatter.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return layer

    def gather(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        is_matrix = name.endswith(("kernel", "lora_a", "lora_b"))
        return gather_param(leaf, P(*param_spec(f"layers.{name}")[1:]), dtype) if is_matrix else leaf

    return jax.tree_util.tree_map_with_path(gather, layer)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_param(param: jax.Array, spec: P, dtype: Any) -> jax.Array:
    """`param`, stored as `spec` says, in `dtype` and complete along `PARAMS`.

    The barriers keep one gather for both streams, and one reduce-scatter of the sum of their gradients; XLA would
    rather pull each into the matrix products, as loops over the shards, and move a kernel as often as it is used.
    """
    order, back = _travelling_order(spec)
    gathered = constrain(param.astype(dtype).transpose(order), *(_without_params(spec[i]) for i in order))
    return jax.lax.optimization_barrier(gathered).transpose(back)


def _without_params(axes):
    """What a dimension is spread over when it is gathered from `PARAMS`."""
    if isinstance(axes, str) or axes is None:
        return axes
    return tuple(axis for axis in axes if axis not in PARAMS) or None


def _gather_fwd(param, spec, dtype):
    return gather_param(param, spec, dtype), jnp.zeros((), param.dtype)


def _gather_bwd(spec, dtype, like, gradient):
    order, back = _travelling_order(spec)
    spread = constrain(jax.lax.optimization_barrier(gradient.transpose(order)), *(spec[i] for i in order))
    return (spread.transpose(back).astype(like.dtype),)


def _travelling_order(spec: P) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How a kernel's axes are ordered while it travels, and back: heads first, head size last.

    That is how XLA lays the operand of a product with heads out; what is gathered so need not be copied again.
    """
    if len(spec) != 3:
        return (*range(len(spec)),), (*range(len(spec)),)
    return ((1, 0, 2), (1, 0, 2)) if spec[0] == PARAMS else ((0, 2, 1), (0, 2, 1))


gather_param.defvjp(_gather_fwd, _gather_bwd)


def _count(mesh: Mesh, axes) -> int:
    count = 1
    for axis in (axes,) if isinstance(axes, str) else axes or ():
        count *= mesh.shape[axis]
    return count
