"""JSON files that users may have damaged."""

import json
import os

from voco_jax.errors import UserError
from voco_jax.files import read_text
from voco_jax.storage import as_path, bucket_errors

MOST = 2**24  # bytes: as Python's objects, 16 MiB of the smallest values are 0.4 GiB


def read_object(path: str | os.PathLike, hint: str = "", most: int = MOST) -> dict:
    """A file that holds one JSON object, of `most` bytes; UserError for any other, with a hint for one that is not
    there."""
    try:
        with bucket_errors(as_path(path), but=FileNotFoundError):
            content = json.loads(read_text(path, most))
    except FileNotFoundError:
        raise UserError(f"{path}: not found{hint and f'; {hint}'}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object, found {type(content).__name__}")
    return content
