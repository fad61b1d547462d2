"""JSON files that users may have damaged."""

from collections.abc import Callable
import gc
import json
import os

from voco_jax.errors import UserError, cannot
from voco_jax.io.files import read_text
from voco_jax.io.paths import as_path, bucket_errors

MOST = 2**23  # bytes: as Python's objects, 8 MiB of the smallest values are 0.4 GiB, and seconds
DEEPEST = 100  # objects and lists in each other: what is compared, copied or shown goes down into them


def read_object(path: str | os.PathLike, hint: str = "", most: int = MOST) -> dict:
    """A file that holds one JSON object, of at most `most` bytes. UserError for any other content, and, with `hint`,
    for a file that is missing."""
    try:
        with bucket_errors(as_path(path), but=FileNotFoundError):
            content = parse(read_text(path, most))
    except FileNotFoundError:
        raise UserError(f"{path}: not found{hint and f'; {hint}'}") from None
    except OSError as error:
        raise cannot(f"{path}: cannot be read", error) from None
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object, found {type(content).__name__}")
    return content


def parse(text: str | bytes, object_pairs_hook: Callable | None = None) -> object:
    """The value of a JSON text. ValueError for any other text, and for values that are nested too deep."""
    collects = gc.isenabled()
    gc.disable()  # to look through millions of new objects again and again takes longer than to make them
    try:
        value = json.loads(text, object_pairs_hook=object_pairs_hook)
    except RecursionError:
        raise ValueError(f"expected at most {DEEPEST} objects and lists in each other") from None
    finally:
        if collects:
            gc.enable()
    level = [value]
    for _ in range(DEEPEST + 1):
        outer = [item for item in level if isinstance(item, dict | list)]
        level = [inner for item in outer for inner in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return value
    raise ValueError(f"expected at most {DEEPEST} objects and lists in each other")
