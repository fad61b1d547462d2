#!/usr/bin/env python
"""Does a converted checkpoint compute what the released code computes? Compare with recorded values.

    voco check-logits --checkpoint RUN --golden golden.npz [--tolerance 1e-4]

The golden file holds, for rows i = 0, 1, …: `rows{i}`, token ids in the released layout (-200 for the image); `images`
[rows, 3, size, size], pixel values; `logits{i}`, the logits from the first token after the image on; and `gen`
[rows, n], greedy tokens. `features` [rows, patches, width], if there, are the projected image features.
Exit status 1 beyond the tolerance or where greedy tokens differ.
"""

from pathlib import Path
import sys
import zipfile
import zlib

import numpy as np

from voco_jax.checkpoint.run import load_run
from voco_jax.convert.golden import check
from voco_jax.errors import UserError, cannot, one_line_errors
from voco_jax.io.files import open_regular
from voco_jax.options import Parser
from voco_jax.terminal import printable

# What numpy raises for a damaged file
_UNREADABLE = (
    EOFError, RuntimeError, MemoryError, TypeError, ValueError, zipfile.BadZipFile, zlib.error
)  # fmt: skip


@one_line_errors
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="run directory, as to-jax writes")
    parser.add_argument("--golden", type=Path, required=True, metavar="FILE.npz", help="recorded values; see above")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference allowed (default 1e-4)")
    args = parser.parse_args()
    try:
        with open_regular(args.golden) as stream, np.load(stream, allow_pickle=False) as file:
            golden = dict(file)
    except OSError as error:
        raise cannot(f"{args.golden}: cannot be read", error) from None
    except _UNREADABLE:  # numpy's own words tell of pickles, which are never read
        raise UserError(f"{args.golden}: expected an npz file of arrays, found another, or a damaged one") from None
    worst, greedy = 0.0, []
    for line in check(load_run(args.checkpoint), golden, str(args.golden)):
        worst_of = "" if line.worst is None else f": worst difference {line.worst:.3g}"
        print(f"{printable(line.what)}{worst_of}")
        if line.worst is not None:
            worst = max(worst, line.worst) if line.worst == line.worst else float("nan")
        greedy.append(line.agrees)
    passed = worst <= args.tolerance and all(greedy)
    print(f"worst difference {worst:.3g}, tolerance {args.tolerance:g}: {'passed' if passed else 'FAILED'}")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
