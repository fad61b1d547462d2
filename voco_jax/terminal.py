"""Text from files on its way to a terminal or a log: it is shown, and never obeyed."""

import re

# Control characters, line separators, halves of characters (names that are not UTF-8), and what turns the direction of
# the text that follows. Marks and joiners, which Hebrew, Arabic and emoji are written with, stay.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    """The text in one line, in which nothing sets colours, titles or the cursor.

    Control characters but those to `keep` are escaped as Python does.

    >>> printable("a\\x1b[2Jb\\nc")
    'a\\\\x1b[2Jb\\\\nc'
    """
    return _UNPRINTABLE.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)
