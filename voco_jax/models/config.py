"""A model's configuration: `ModelConfig`, the keys of `config.model`, and `VoCoConfig`, which a model is made of."""

import dataclasses

from voco_jax.attention import ADAPTERS, get_adapter
from voco_jax.attention.windows import binding, refuse
from voco_jax.errors import UserError
from voco_jax.keys import all_keys, key
from voco_jax.models import presets
from voco_jax.models.compressors import COMPRESSORS, EMBEDDINGS, Compressor
from voco_jax.models.linear import LoRAConfig
from voco_jax.models.llama import LlamaConfig
from voco_jax.models.stack import REMAT
from voco_jax.models.vit import ViTConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The keys of `config.model`; `build.py` makes a `VoCoConfig` of them and the tokenizer's facts."""

    llama: LlamaConfig = key(presets.LLAMA["demo"], "language model; presets: voco_jax/models/presets.py")
    vision: ViTConfig = key(presets.VIT["demo"], "vision tower; presets: voco_jax/models/presets.py")
    compressor: str = key(
        "voco", "'voco', 'voco_embedding' (a smaller memory), 'none' (LLaVA: all patches are read), 'average_pool' or "
        "'qformer'", one_of=(*COMPRESSORS,),
    )  # fmt: skip
    num_voco_tokens: int = key(
        1, "VoCo tokens per image (K); with 'none' they are plain text, and 0 is plain LLaVA", low=0, below=2**20
    )
    num_compressed_tokens: int = key(1, "tokens per image with average_pool and qformer", low=1, below=2**20)
    num_qformer_layers: int = key(2, "layers of the Q-Former, with qformer", low=1, below=2**6)
    projector_layers: int = key(
        2, "linear layers with GELU between (2: LLaVA-1.5's mlp2x_gelu; 1: the first LLaVA's)",
        low=1, below=2**6, earlier=2,
    )  # fmt: skip
    projector_bias: bool = key(True, "biases in the projector", earlier=True)
    param_dtype: str = key(
        "float32", "dtype in which parameters are stored and updated; or 'bfloat16'", one_of=DTYPES, on_load="free"
    )
    dtype: str = key(
        "auto", "dtype of the computation; 'auto': bfloat16 on accelerators, float32 on a CPU",
        one_of=DTYPES, on_load="free",
    )  # fmt: skip
    attention: str = key(
        "xla", "attention kernel: 'xla' (any platform), 'splash' (TPU) or 'cudnn' (NVIDIA GPU)",
        one_of=(*ADAPTERS,), on_resume="free", on_load="free",
    )  # fmt: skip
    remat: str = key(
        "none", "what the backward pass computes again to save memory: 'none' to 'full' (models/stack.py)",
        one_of=("none", *REMAT), on_resume="free", on_load="free",
    )  # fmt: skip
    unroll_layers: bool = key(
        False, "no loop over layers: faster for few and small ones", on_resume="free", on_load="free"
    )
    lora: LoRAConfig = key(LoRAConfig(), "low-rank updates of the language model's kernels, which stay frozen")


@dataclasses.dataclass(frozen=True)
class VoCoConfig(ModelConfig):
    """Everything that fixes the function a checkpoint computes, and how to compute it.

    prefix_ids and suffix_ids are what the tokenizer makes of the text before and between image and VoCo tokens
    (Llama's: BOS, and `▁ \\n`); voco_token_id is the one id that all K VoCo tokens share. dtypes are never 'auto'.
    """

    dtype: str = "float32"
    lora: LoRAConfig | None = None  # type: ignore[assignment]  # none, where the key has rank 0
    voco_token_id: int = 32000
    prefix_ids: tuple[int, ...] = (1,)
    suffix_ids: tuple[int, ...] = (28705, 13)

    def __post_init__(self) -> None:
        self.compressor_class.check(self)
        if not 0 <= self.voco_token_id < self.llama.vocab_size:
            vocabulary = f"of a vocabulary of {self.llama.vocab_size}"
            raise ValueError(f"voco_token_id: expected an id {vocabulary}, found {self.voco_token_id}")

    @property
    def compressor_class(self) -> type[Compressor]:
        return COMPRESSORS[self.compressor]

    @property
    def memory_kind(self) -> str:
        """KEYS_AND_VALUES or EMBEDDINGS, which a compress stream makes of an image; '' where there is none."""
        return self.compressor_class.memory_kind

    @property
    def has_compress_stream(self) -> bool:
        return bool(self.memory_kind)

    @property
    def num_visual_tokens(self) -> int:
        """Places of the read stream that one image takes (M): K slots, or embeddings."""
        return self.compressor_class.num_visual_tokens(self)

    @property
    def compress_length(self) -> int:
        """Tokens of one image's segment of the compress stream (S); 0 where there is none."""
        if not self.has_compress_stream:
            return 0
        return len(self.prefix_ids) + self.vision.num_features + len(self.suffix_ids) + self.num_voco_tokens

    def check_kernels(self, row_length: int, *, training: bool, whole_images: int = 0) -> None:
        """ValueError, at set-up, where the attention kernel's library refuses this model, or read rows so long.

        `whole_images`: a row reads so many images whole.
        """
        adapter = get_adapter(self.attention)
        if binding(self.llama.sliding_window, max(row_length, self.compress_length)) and not adapter.WINDOWS:
            refuse(self.attention, self.llama.sliding_window)
        if whole_images:
            self.check_whole(row_length, whole_images)
        adapter.check(
            heads=self.llama.num_attention_heads, kv_heads=self.llama.num_key_value_heads, size=self.llama.head_dim,
            dtype=self.dtype, segment_length=self.compress_length, row_length=row_length, training=training,
            before_length=whole_images * self.compress_length,
        )  # fmt: skip

    def check_whole(self, row_length: int, images: int) -> None:
        """ValueError where text that reads so many images whole would not see all of them."""
        longest = row_length + images * self.compress_length
        if binding(self.llama.sliding_window, longest):
            raise ValueError(
                f"llama.sliding_window: expected at least {longest} where images are read whole, found "
                f"{self.llama.sliding_window}"
            )

    def projector_flops(self, images: int) -> float:
        """FLOPs of the projector, forward."""
        width = self.llama.hidden_size
        inputs = self.vision.feature_size + (self.projector_layers - 1) * width
        return images * self.vision.num_features * 2 * inputs * width

    def compress_flops(self, images: int) -> float:
        """FLOPs of images through the compress stream, forward; of its last layer only what the memory needs."""
        tokens, layers = images * self.compress_length, self.llama.num_hidden_layers
        all_layers = self.llama.layers_flops(tokens, self.compress_length, self.lora)
        if self.memory_kind == EMBEDDINGS:
            return all_layers
        last = 2 * self.llama.layer_params(self.lora, ("k_proj", "v_proj"))
        return all_layers / layers * (layers - 1) + tokens * last


def model_error(error: Exception) -> UserError:
    """The error to raise where a model cannot be made or traced. Our own messages begin with the key in `config.model`;
    others are jax's."""
    line = (str(error).splitlines() or [type(error).__name__])[0]  # jax raises some without a text
    is_ours = line.partition(":")[0] in all_keys(ModelConfig())
    return UserError(f"config.model.{line}" if is_ours else f"config.model: {line}")
