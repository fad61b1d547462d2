"""A run directory, restored to be used: `config.json`, `tokenizer/`, `checkpoints/<step>/`, `metrics.jsonl`."""

import contextlib
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from voco_jax.attention import check_platform
from voco_jax.checkpoint.checkpointer import Checkpointer
from voco_jax.config import load_config
from voco_jax.data.conversations import Encoder
from voco_jax.data.from_config import make_encoder, make_model_config, make_processor
from voco_jax.data.images import ImageProcessor
from voco_jax.data.tokenizer import load_run_tokenizer, vocabulary_sum
from voco_jax.errors import UserError
from voco_jax.io.paths import AnyPath, as_path
from voco_jax.models.build import abstract_model
from voco_jax.models.compressors import COMPRESSORS
from voco_jax.models.voco import LONG_PROMPT, VoCoLlama
from voco_jax.parallel.compilation_cache import use_compilation_cache
from voco_jax.parallel.mesh import find_devices
from voco_jax.parallel.sharding import param_shardings, with_shardings


@dataclasses.dataclass(frozen=True, repr=False)
class Run:
    """What a run directory holds, restored."""

    directory: AnyPath
    config: ConfigDict
    model: VoCoLlama
    encoder: Encoder
    processor: ImageProcessor
    step: int
    checksums: dict[str, int]  # of the parameters as they are stored, by dotted path
    vocabulary: str = ""  # SHA-256 of the tokenizer's; '' where the checkpoint says nothing of its tokenizer
    mesh: Mesh | None = None

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r}, step {self.step})"


def load_run(
    directory: str | AnyPath,
    *,
    step: int | str | None = None,
    compressor: str | None = None,
    attention: str | None = None,
    mesh: Mesh | None = None,
) -> Run:
    """Restore a checkpoint of a run, to be used: the newest, that of a `step`, or the 'best' (lowest evaluation loss).

    UserError says what is missing or does not fit. Kernels and embeddings are in the dtype of the computation, or in a
    smaller one that they are stored in; over a `mesh` they are spread as in training, else on one device.

    `compressor='voco'` runs a model that was trained uncompressed (with VoCo tokens in its text) as two streams: the
    paper's lower bound. `attention` is another kernel than it was trained with, which may be for other devices.
    """
    find_devices()
    use_compilation_cache()
    directory = as_path(directory)
    config = load_config(directory / "config.json")
    if compressor is not None:
        trained = config.model.compressor
        if compressor not in COMPRESSORS:
            raise UserError(f"compressor: expected one of {', '.join(COMPRESSORS)}; found {compressor!r}")
        if compressor != trained and any(COMPRESSORS[kind].has_weights for kind in (compressor, trained)):
            expected = f"expected {trained!r}, with which {directory} was trained"
            raise UserError(f"--compressor: {expected}; found {compressor!r}")
        config.model.compressor = compressor
    if attention is not None:
        config.model.attention = attention
    tokenizer = load_run_tokenizer(directory)
    model_config = make_model_config(config, tokenizer)
    try:
        check_platform(model_config.attention)
        model_config.check_kernels(LONG_PROMPT, training=False)
    except ValueError as error:
        raise UserError(f"{directory}: {error} (--attention)") from None
    if model_config.dtype == "float16" and jax.default_backend() == "cpu":  # XLA has no such products there
        raise UserError(
            f"{directory / 'config.json'}: model.dtype: float16 needs a GPU, found cpu; 'auto' takes float32"
        )
    graphdef, params = abstract_model(model_config)
    params = for_use(params, model_config.dtype)
    if mesh is not None:
        params = with_shardings(params, param_shardings(mesh, params, for_use=True))
    with contextlib.closing(Checkpointer(directory)) as checkpointer:
        restored = checkpointer.restore_params(params, step)
    return Run(
        directory=directory,
        config=config,
        model=nnx.merge(graphdef, restored.params),
        encoder=make_encoder(config, tokenizer, model_config),
        processor=make_processor(config),
        step=restored.step,
        checksums=restored.checksums,
        vocabulary=vocabulary_sum(tokenizer) if "tokenizer" in restored.about else "",
        mesh=mesh,
    )


def for_use(params, dtype: str):
    """Parameters' shapes with the dtype that they are used in, where that is the smaller one: matrices are rounded to
    it anyway, norms are not."""

    def wanted(path, x):
        is_matrix = getattr(path[-1], "key", None) in ("kernel", "embedding")
        rounded = is_matrix and jnp.dtype(dtype).itemsize < x.dtype.itemsize
        return jax.ShapeDtypeStruct(x.shape, dtype if rounded else x.dtype)

    return jax.tree_util.tree_map_with_path(wanted, params)
