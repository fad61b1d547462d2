"""Compares a run of ours with recorded values of the released code (`voco check-logits`)."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from voco_jax.checkpoint.run import Run
from voco_jax.data.conversations import Sample
from voco_jax.data.packing import pack_row
from voco_jax.errors import UserError
from voco_jax.infer.generate import greedy
from voco_jax.models.build import abstract_model
from voco_jax.models.voco import Read, VoCoConfig, VoCoLlama

IMAGE = -200  # stands for an image in the released code's token ids


@dataclasses.dataclass(frozen=True)
class Line:
    """One comparison: the worst absolute difference, and whether greedy tokens agree."""

    what: str
    worst: float | None = None
    agrees: bool = True


def check(run: Run, golden: Mapping[str, np.ndarray], name: str) -> Iterator[Line]:
    """Compare features, logits and greedy tokens, in float32. UserError for a golden file of another form."""
    model = run.model
    kind = model.config.compressor_class
    if kind.has_weights or not kind.has_voco_tokens:
        raise UserError(f"{run.directory}: expected compressor voco or none, found {model.config.compressor}")
    rows = _rows(golden, name)
    layout = _layout(rows, model.config, name)
    model = _model(model, *layout)
    _check_shapes(golden, rows, model.config, name)
    config, count = model.config, len(rows)
    images = golden["images"].astype(np.float32).transpose(0, 2, 3, 1)[:, None]
    graphdef, params = nnx.split(model)
    features = np.asarray(_run(VoCoLlama.encode_images, graphdef, params, images))
    if "features" in golden:
        yield Line("features", _worst(features[:, 0], golden["features"]))
    after = len(config.suffix_ids) + config.num_voco_tokens
    before = len(config.prefix_ids) + 1 + len(config.suffix_ids)
    compressed = np.asarray(_run(VoCoLlama.compress_logits, graphdef, params, features))[:, 0, -after:]
    samples = [_sample(row[before:], config.num_voco_tokens) for row in rows]
    for i, sample in enumerate(samples):
        read = _read([sample], len(sample))
        logits = np.asarray(_run(VoCoLlama.forward, graphdef, params, read, features[i : i + 1]))[0]
        expected = golden[f"logits{i}"]
        ours = np.concatenate([compressed[i], logits[config.num_voco_tokens :]])
        ours = ours[:, : expected.shape[1]]  # rows for added tokens may follow
        yield Line(f"row {i}: logits", _worst(ours, expected))
    if "gen" in golden:
        length, total = max(map(len, samples)), golden["gen"].shape[1]
        read = _read(samples, length)
        read = read._replace(positions=jnp.broadcast_to(jnp.arange(length), (count, length)))
        lengths = np.array([len(sample) for sample in samples])
        tokens = _run(_greedy_tokens, graphdef, params, features, read, lengths, golden["gen"])
        same = (np.asarray(tokens) == golden["gen"]).cumprod(axis=1).sum(axis=1)
        for i in range(count):
            yield Line(f"row {i}: {same[i]} of {total} greedy tokens agree", agrees=bool(same[i] == total))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(function: Callable, graphdef: nnx.GraphDef, params: nnx.State, *arguments) -> jax.Array:
    """`function` of the model and the arguments, compiled as one program."""
    return function(nnx.merge(graphdef, params), *arguments)


def _greedy_tokens(model: VoCoLlama, features, read: Read, lengths, expected) -> jax.Array:
    return greedy(model, read, lengths, model.compress(features), expected.shape[1], eos_token_id=-1)


def _rows(golden: Mapping[str, np.ndarray], name: str) -> list[np.ndarray]:
    """`rows0`, `rows1` …: all of them, without a gap."""
    count = sum(key.removeprefix("rows").isdigit() for key in golden if key.startswith("rows"))
    for key in ["images", *(f"{key}{i}" for i in range(max(count, 1)) for key in ("rows", "logits"))]:
        if key not in golden:
            raise UserError(f"{name}: key {key!r} is missing")
    for i in range(count):
        if golden[f"rows{i}"].ndim != 1 or golden[f"rows{i}"].dtype.kind not in "iu":
            raise UserError(f"{name}: rows{i}: expected a list of token ids, found {_kind(golden[f'rows{i}'])}")
        if golden[f"rows{i}"].size and np.abs(golden[f"rows{i}"]).max() >= 2**31:
            raise UserError(f"{name}: rows{i}: expected token ids, found {np.abs(golden[f'rows{i}']).max()}")
    return [golden[f"rows{i}"].astype(np.int32) for i in range(count)]


def _layout(rows: list[np.ndarray], config: VoCoConfig, name: str) -> tuple[tuple, tuple, int]:
    """(tokens before the image, tokens between it and the VoCo tokens, K), which all rows must share."""
    layouts = []
    for i, row in enumerate(rows):
        image, voco = np.flatnonzero(row == IMAGE), np.flatnonzero(row == config.voco_token_id)
        if len(image) != 1 or not len(voco) or voco[0] < image[0] or voco[-1] - voco[0] != len(voco) - 1:
            raise UserError(
                f"{name}: rows{i}: expected one image ({IMAGE}), then VoCo tokens ({config.voco_token_id}) side by side"
            )
        text = row[row != IMAGE]
        if text.min() < 0 or text.max() >= config.llama.vocab_size or voco[-1] == len(row) - 1:
            raise UserError(
                f"{name}: rows{i}: expected text after the VoCo tokens, ids below {config.llama.vocab_size}"
            )
        layouts.append((tuple(row[: image[0]].tolist()), tuple(row[image[0] + 1 : voco[0]].tolist()), len(voco)))
        if layouts[i] != layouts[0]:
            raise UserError(f"{name}: rows{i}: expected the tokens up to the last VoCo token to be those of rows0")
    return layouts[0]


def _check_shapes(golden: Mapping[str, np.ndarray], rows: list[np.ndarray], config: VoCoConfig, name: str) -> None:
    """UserError for arrays whose shapes or dtypes do not fit the rows and the model."""
    count, size = len(rows), config.vision.image_size
    expected: dict[str, tuple[int, ...]] = {"images": (count, 3, size, size)}
    if "features" in golden:
        expected["features"] = (count, config.vision.num_features, config.llama.hidden_size)
    if "gen" in golden:
        expected["gen"] = (count, *golden["gen"].shape[1:2])
    for i, row in enumerate(rows):
        vocabulary = golden[f"logits{i}"].shape[-1] if golden[f"logits{i}"].ndim else 0
        after = len(row) - len(config.prefix_ids) - 1
        expected[f"logits{i}"] = (after, min(vocabulary, config.llama.vocab_size))
    for key, shape in expected.items():
        kinds = "iu" if key == "gen" else "f"
        if golden[key].shape != shape or golden[key].dtype.kind not in kinds or not golden[key].size:
            raise UserError(f"{name}: {key}: expected {list(shape)} of kind {kinds!r}, found {_kind(golden[key])}")


def _kind(array: np.ndarray) -> str:
    return f"{list(array.shape)} of {array.dtype}"


def _model(model: VoCoLlama, prefix_ids: tuple, suffix_ids: tuple, num_voco_tokens: int) -> VoCoLlama:
    """The model in float32, with the rows' tokens around the image and their number of VoCo tokens."""
    config = dataclasses.replace(
        model.config, dtype="float32", compressor="voco", num_voco_tokens=num_voco_tokens,
        prefix_ids=prefix_ids, suffix_ids=suffix_ids,
    )  # fmt: skip
    _, state = nnx.split(model)
    return nnx.merge(abstract_model(config)[0], state)


def _sample(tokens: np.ndarray, num_voco_tokens: int) -> Sample:
    slot_index = np.full(len(tokens), -1, np.int32)
    slot_index[:num_voco_tokens] = np.arange(num_voco_tokens)
    return Sample(tokens, np.zeros(len(tokens), bool), slot_index, num_images=1)


def _read(samples: list[Sample], length: int) -> Read:
    rows = [pack_row([sample], length) for sample in samples]
    return Read(*(jnp.stack([getattr(row, name) for row in rows]) for name in Read._fields))


def _worst(ours, expected) -> float:
    return float(np.abs(np.asarray(ours) - expected).max())
