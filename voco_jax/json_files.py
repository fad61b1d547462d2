"""JSON files that users may have damaged."""

import json
import os

from voco_jax.errors import UserError
from voco_jax.storage import as_path, bucket_errors


def read_object(path: str | os.PathLike, hint: str = "") -> dict:
    """A file that holds one JSON object; UserError for any other, with a hint for one that is not there."""
    try:
        with bucket_errors(as_path(path), but=FileNotFoundError):
            content = json.loads(as_path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: not found{hint and f'; {hint}'}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object, found {type(content).__name__}")
    return content
