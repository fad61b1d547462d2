"""A task's `generation_kwargs` (or `--gen_kwargs`) as what voco_jax generates by. One that cannot be honoured is an
error: a benchmark's figures would be others' than the task asks for."""

from collections.abc import Mapping
import dataclasses

from voco_jax.errors import UserError
from voco_jax.infer.engine import GREEDY
from voco_jax.infer.generate import Sampling

# Values that change nothing here; any other is refused
_NO_EFFECT = {
    "num_beams": (1, None),
    "repetition_penalty": (1, None),
    "length_penalty": (1, None),
    "skip_special_tokens": (True, None),
    "use_cache": (True, None),
    "image_aspect_ratio": ("original", None),  # lmms-eval's word for the model's own way
}


@dataclasses.dataclass(frozen=True)
class Generation:
    """How answers are chosen, and what ends them beside the end-of-sequence token."""

    max_new_tokens: int
    sampling: Sampling = GREEDY
    until: tuple[str, ...] = ()


def read_generation(kwargs: Mapping, max_new_tokens: int, seed: int, aspect_ratio: str) -> Generation:
    """Of generation keywords; `max_new_tokens` and `seed` where they name none. Names are transformers'.

    Drawn is where `do_sample` is not false and the temperature not 0 (1 where none is given, with `do_sample`).
    UserError for a keyword or a value that cannot be honoured; `aspect_ratio` is the run's own.
    """
    given = dict(kwargs)
    until = [*_texts(given, "until"), *_texts(given, "stop_sequences")]
    limit = given.pop("max_new_tokens", None)
    do_sample, temperature = given.pop("do_sample", None), given.pop("temperature", None)
    top_p, top_k, own_seed = (given.pop(name, None) for name in ("top_p", "top_k", "seed"))
    seed = seed if own_seed is None else own_seed
    for name, value in given.items():
        allowed = (*_NO_EFFECT.get(name, ()), *((aspect_ratio,) if name == "image_aspect_ratio" else ()))
        if name not in _NO_EFFECT or value not in allowed:
            expected = f"expected {allowed[0]!r}" if allowed else "expected none of that name"
            raise UserError(f"generation_kwargs.{name}: voco_jax cannot honour it: {expected}, found {value!r}")
    limit = max_new_tokens if limit is None else limit
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise UserError(f"generation_kwargs.max_new_tokens: expected at least 1, found {limit!r}")
    if temperature is None:
        temperature = 1.0 if do_sample else 0.0
    if do_sample is False or temperature == 0:  # top_p and top_k choose the likeliest, whatever they are
        return Generation(limit, GREEDY, tuple(until))
    try:
        sampling = Sampling(float(temperature), int(top_k or 0), 1.0 if top_p is None else float(top_p), int(seed))
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"generation_kwargs.{error}") from None
    return Generation(limit, sampling, tuple(until))


def _texts(given: dict, name: str) -> list[str]:
    value = given.pop(name, None)
    texts = [value] if isinstance(value, str) else list(value or ())
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"generation_kwargs.{name}: expected texts, found {value!r}")
    return [text for text in texts if text]
