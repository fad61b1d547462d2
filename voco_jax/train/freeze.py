"""Which parameters train: the tree in two, so that what is frozen has neither gradients nor optimizer state."""

from collections.abc import Sequence

from voco_jax.errors import UserError


def split_params(params: dict, freeze: Sequence[str]) -> tuple[dict, dict]:
    """(trained, frozen) of a nested dict; `freeze` holds dotted paths of parts. UserError for a path that is none."""
    trained, frozen = _copy(params), {}
    for path in freeze:
        *parents, last = path.split(".")
        source, target = trained, frozen
        for key in parents:
            source = source.get(key) if isinstance(source, dict) else None
            target = target.setdefault(key, {})
        if not isinstance(source, dict) or last not in source:
            raise UserError(f"config.train.freeze: expected parts such as {', '.join(params)}; found {path!r}")
        target[last] = source.pop(last)
    return trained, frozen


def merge_params(trained: dict, frozen: dict) -> dict:
    """The tree that `split_params` took apart."""
    merged = dict(trained)
    for key, value in frozen.items():
        merged[key] = merge_params(merged[key], value) if isinstance(merged.get(key), dict) else value
    return merged


def _copy(tree):
    return {key: _copy(value) for key, value in tree.items()} if isinstance(tree, dict) else tree
