"""Which parameters train: the tree in two, so that what is frozen has neither gradients nor optimizer state."""

from collections.abc import Sequence
import dataclasses

from flax.traverse_util import flatten_dict, unflatten_dict
import jax

from voco_jax.errors import UserError
from voco_jax.models.voco import VoCoConfig

EMBEDDING = ("llama", "embed_tokens", "embedding")
VISION = ("vision_tower", "projector")  # what acts through the compress stream alone
VOCO_ROW = ("llama", "embed_tokens", "voco_row")  # in the trained tree alone: of a frozen embedding, the VoCo token's


@dataclasses.dataclass(frozen=True)
class TrainableFilter:
    """What stays as it is: the parts at dotted `paths`, and with `base` the language model but for LoRA's matrices.

    Neither touches LoRA's matrices. Where the embedding [V, D] is frozen, its row `voco_token_id` trains all the same
    (None: no row does), as a parameter [D] of its own; parameters that are whole never show it. Without
    `compress_gradients` images' memories are constants to the training step, and `paths` name what then has none.
    """

    paths: tuple[str, ...] = ()
    voco_token_id: int | None = None
    base: bool = False
    compress_gradients: bool = True

    @classmethod
    def of_model(
        cls, config: VoCoConfig, freeze: Sequence[str] = (), compress_gradients: bool = True
    ) -> "TrainableFilter":
        """What `train.freeze`, `train.compress_gradients` and LoRA leave to train.

        The VoCo token's row trains in models whose text has VoCo tokens. UserError where there is no compress stream
        to have gradients or not.
        """
        paths, has_voco = tuple(freeze), config.compressor_class.has_voco_tokens
        if not compress_gradients:
            if not config.has_compress_stream:
                expected = f"expected True with compressor {config.compressor!r}, which has no compress stream"
                raise UserError(f"config.train.compress_gradients: {expected}; found False")
            # The read stream takes its slots, or their inputs, from the memory: the VoCo token's embedding is not in it
            constant = (*VISION, "compressor") if config.compressor_class.has_weights else VISION
            paths, has_voco = (*paths, *(part for part in constant if part not in paths)), False
        voco_token_id = config.voco_token_id if has_voco else None
        return cls(paths, voco_token_id, base=config.lora is not None, compress_gradients=compress_gradients)

    def split(self, params: dict) -> tuple[dict, dict]:
        """(trained, frozen) of a nested dict of arrays. UserError for an unknown path, or if nothing trains."""
        leaves = flatten_dict(params)
        for path in self.paths:
            if not any(_is_in(path, keys) for keys in leaves):
                raise UserError(f"config.train.freeze: expected parts such as {', '.join(params)}; found {path!r}")
            if all(is_lora(keys) for keys in leaves if _is_in(path, keys)):
                raise UserError(f"config.train.freeze: LoRA's matrices always train; found {path!r}")
        frozen = {keys: leaf for keys, leaf in leaves.items() if self._is_frozen(keys)}
        trained = {keys: leaf for keys, leaf in leaves.items() if keys not in frozen}
        if self.voco_token_id is not None and EMBEDDING in frozen:
            trained[VOCO_ROW] = frozen[EMBEDDING][self.voco_token_id]
        if not trained:
            why = "" if self.compress_gradients else " (some of it by config.train.compress_gradients=False)"
            raise UserError(f"config.train.freeze: expected something to train, found {', '.join(self.paths)}{why}")
        return unflatten_dict(trained), unflatten_dict(frozen)

    def merge(self, trained: dict, frozen: dict) -> dict:
        """The tree that `split` took apart."""
        leaves = flatten_dict(frozen) | flatten_dict(trained)
        row = leaves.pop(VOCO_ROW, None)
        if row is not None:
            leaves[EMBEDDING] = leaves[EMBEDDING].at[self.voco_token_id].set(row)
        return unflatten_dict(leaves)

    def trained(self, params: dict) -> dict:
        """The trained tree of parameters that are shapes and dtypes."""
        return jax.eval_shape(lambda params: self.split(params)[0], params)

    def _is_frozen(self, keys: tuple[str, ...]) -> bool:
        if is_lora(keys):
            return False
        return self.base and keys[0] == "llama" or any(_is_in(path, keys) for path in self.paths)


def is_lora(keys: tuple[str, ...]) -> bool:
    """Whether a parameter at these keys is one of LoRA's matrices."""
    return "lora" in keys


def _is_in(path: str, keys: tuple[str, ...]) -> bool:
    parts = tuple(path.split("."))
    return keys[: len(parts)] == parts
