"""Text on its way to a terminal or a log: what comes out of files is shown, and never obeyed."""

import functools
import re
import reprlib
import sys

from tqdm import tqdm

# Control characters, line separators, halves of characters (names that are not UTF-8), and what turns the direction of
# the text that follows. Marks and joiners, which Hebrew, Arabic and emoji are written with, stay.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    """The text in one line, in which nothing sets colours, titles or the cursor.

    Control characters except those in `keep` are escaped as Python does.

    >>> printable("a\\x1b[2Jb\\nc")
    'a\\\\x1b[2Jb\\\\nc'
    """
    return _UNPRINTABLE.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def shortened(value: object, most: int = 100) -> str:
    """A value out of a file as Python shows it, for a message: one line of at most `most` characters, however long or
    deeply nested the value is.

    >>> shortened([[[[[[[[]]]]]]]]), shortened("a" * 999, 20)
    ('[[[[[[...]]]]]]', "'aaaaaa...aaaaaaaa'")
    """
    short = reprlib.Repr()
    short.maxstring = short.maxother = most
    text = " ".join(short.repr(value).split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def count_of(number: int, noun: str) -> str:
    """A number of things.

    >>> count_of(1, "image"), count_of(2000, "image"), count_of(3, "batch")
    ('1 image', '2,000 images', '3 batches')
    """
    plural = "" if number == 1 else "es" if noun.endswith("ch") else "s"
    return f"{number:,} {noun}{plural}"


def one_line(text: str, most: int = 500) -> str:
    """Text with names from data in it, which may hold anything: printable, on one line, of at most `most` characters.

    >>> one_line("a\\nb\\x1b[2J.jpg: not found")
    'a b\\\\x1b[2J.jpg: not found'
    """
    text = printable(" ".join(text[: 2 * most].split()))
    return text if len(text) <= most else text[: most - 1] + "…"


def log(line: str) -> None:
    """A line on standard error, above the progress bar if there is one."""
    tqdm.write(printable(line), file=sys.stderr)
    sys.stderr.flush()


@functools.cache
def log_once(line: str) -> None:
    """`log`, once for each line."""
    log(line)
