"""Refuses pictures that are small files but would take gigabytes or minutes to decode, by their headers alone.

Pillow checks width and height only. Its decoders accept JPEGs with thousands of scans, TIFF tiles larger than the
picture, JPEG 2000 images of millions of parts, and long plain-text pixmaps. These are checked here.
"""

import io
import re
import struct
from typing import BinaryIO

# Far above what cameras, editors and GIS tools write
MOST_SCANS = 1000  # of a JPEG
MOST_SCANNED = 2**29  # pixels in all scans together, of more scans than encoders make by themselves (`USUAL_SCANS`)
USUAL_SCANS = 18  # libjpeg's, of CMYK
MOST_SEGMENTS = 2**16  # of a JPEG, before its pixels; and behind its first scan
MOST_METADATA = 2**25  # bytes in these
MOST_CHUNKS = 2**18  # of a PNG
MOST_TILE = 2**28  # values in a TIFF's tile, where it is larger than the picture
MOST_PARTS = 2**21  # of JPEG 2000: precincts, and blocks of code
MOST_PLAIN = 19_000_000  # values of a portable pixmap in plain text: 6 megapixels of colour, some 6 seconds
MOST_DECODED = 7 * 2**27  # bytes for a tile of JPEG 2000: OpenJPEG takes 4 for each value, and Pillow the value's own
_HEAD = 2**12  # bytes in which a pixmap has its header
# Among pixels a byte of 255 is followed by 0 or is a restart; what is below C0 has no length, and may be passed over
_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd8-\xfe])")


def asks_too_much(file: BinaryIO, whole: bool = True) -> str:
    """'expected …, found …' for a picture that would take too much; '' for any other. Rewinds the file.

    `whole` also looks at what follows the header.
    """
    file.seek(0)
    head = file.read(16)
    try:
        if head[:2] == b"\xff\xd8":
            return _jpeg(file, whole)
        if head[:4] == b"\x89PNG":
            return _png(file)
        if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _tiff(file, head)
        if head[:4] == b"\xff\x4f\xff\x51" or head[4:8] == b"jP  ":
            return _jpeg_2000(file) if whole else ""
        if re.match(rb"P[0-9A-Za-z]\s", head):
            return _pixmap(file)
        return ""
    finally:
        file.seek(0)


def _jpeg(file: BinaryIO, whole: bool) -> str:
    at, pixels = 2, 0
    size = file.seek(0, io.SEEK_END)
    for _ in range(MOST_SEGMENTS):
        file.seek(at)
        segment = file.read(9)
        if len(segment) < 4:
            return ""
        if segment[0] != 0xFF or segment[1] == 0xFF:  # what is between two segments
            rest = segment + file.read(2**16)
            found = re.search(rb"\xff[^\xff]", rest)
            at += found.start() if found else len(rest)
        elif segment[1] in (0x00, 0x01, *range(0xD0, 0xD9)):  # without a length
            at += 2
        elif segment[1] == 0xDA:
            break
        else:
            if 0xC0 <= segment[1] <= 0xCF and segment[1] not in (0xC4, 0xC8, 0xCC):
                height, width = struct.unpack(">HH", segment[5:9].ljust(4, b"\0"))
                pixels = max(pixels, height * width)
            at += 2 + max(2, int.from_bytes(segment[2:4]))
        if at > MOST_METADATA:
            return f"expected at most {MOST_METADATA} bytes before the pixels, found {min(at, size)}"
    else:
        return f"expected at most {MOST_SEGMENTS} segments before the pixels, found more"
    if not whole:
        return ""
    file.seek(at)
    scans = _scans(file.read())
    if scans is None:
        return f"expected at most {MOST_SEGMENTS} segments behind the first scan, found more"
    most = min(MOST_SCANS, max(USUAL_SCANS, MOST_SCANNED // max(1, pixels)))
    if scans > most:
        return f"expected at most {most} scans of {pixels} pixels, found {scans}"
    return ""


def _scans(data: bytes) -> int | None:
    """The number of scans of a JPEG, from the first on; None for too many segments. What follows the picture, such as a
    video, is not looked at."""
    scans, at = 0, 0
    for _ in range(MOST_SEGMENTS):
        found = _MARKER.search(data, at)
        if not found or found[1] in (b"\xd8", b"\xd9"):
            return scans
        scans += found[1] == b"\xda"
        at = found.end() + max(2, int.from_bytes(data[found.end() : found.end() + 2]))
    return None


def _png(file: BinaryIO) -> str:
    at, size = 8, file.seek(0, io.SEEK_END)
    for _ in range(MOST_CHUNKS):
        if at >= size:
            return ""
        file.seek(at)
        chunk = file.read(8)
        if chunk[4:] == b"IEND":  # behind it is anything
            return ""
        at += 12 + int.from_bytes(chunk[:4])
    return f"expected at most {MOST_CHUNKS} chunks, found more"


def _tiff(file: BinaryIO, head: bytes) -> str:
    """Looks at the first picture of the file."""
    head = head.ljust(16, b"\0")  # of a file that is cut off
    order, large = "<" if head[:1] == b"I" else ">", b"+" in head[:4]
    place = struct.unpack_from(order + "Q", head, 8)[0] if large else struct.unpack_from(order + "I", head, 4)[0]
    file.seek(min(place, file.seek(0, io.SEEK_END)))
    width = 8 if large else 2
    count = int.from_bytes(file.read(width), "little" if order == "<" else "big")
    step = 20 if large else 12
    values: dict[int, int] = {}
    entries = file.read(step * min(count, 2**16))
    for at in range(0, len(entries) - step + 1, step):
        tag, kind = struct.unpack_from(order + "HH", entries, at)
        of_kind = {1: "B", 3: "H", 4: "I", 16: "Q" if large else "I"}.get(kind)
        if tag in (256, 257, 277, 322, 323) and of_kind:
            value = struct.unpack_from(order + of_kind, entries, at + (12 if large else 8))[0]
            worse = min if tag in (256, 257) else max  # of a tag that is there twice
            values[tag] = worse(values.get(tag, value), value)
    tile = values.get(322, 0) * values.get(323, 0) * max(1, values.get(277, 1))
    larger = values.get(322, 0) >= values.get(256, 0) + 16 or values.get(323, 0) >= values.get(257, 0) + 16
    if tile > MOST_TILE and larger:  # a side of a tile is a multiple of 16
        return f"expected tiles of {MOST_TILE} values at most, found {values[322]} x {values[323]} pixels"
    return ""


def _jpeg_2000(file: BinaryIO) -> str:
    """Looks at every code stream of the file; boxes may stand before it."""
    data = file.read() if file.seek(0) == 0 else b""
    for start in re.finditer(rb"\xff\x4f\xff\x51", data):
        sizes = data[start.end() + 2 : start.end() + 38]
        if len(sizes) < 36:
            continue
        x1, y1, x0, y0, tile_x, tile_y, _, _, components = struct.unpack(">2x8IH", sizes)
        width, height = max(0, x1 - x0), max(0, y1 - y0)
        tiles = -(-width // max(1, tile_x)) * -(-height // max(1, tile_y))
        parts = components * max(
            [tiles, *(_parts(style, width, height) for style in _code_styles(data, start.end() - 2))]
        )
        if parts > MOST_PARTS:
            return f"expected at most {MOST_PARTS} tiles, precincts and blocks, found {parts}"
        across, down, entries = min(width, tile_x), min(height, tile_y), start.end() + 38
        of_each = data[entries : entries + 3 * components]
        decoded = sum(
            -(-across // max(1, x)) * -(-down // max(1, y)) * (5 + (bits & 127) // 8)
            for bits, x, y in zip(of_each[::3], of_each[1::3], of_each[2::3], strict=False)  # of a file that is cut off
        )
        if decoded > MOST_DECODED:
            return f"expected tiles of {MOST_DECODED} bytes at most while decoded, found {decoded}: {across} x {down}"
    return ""


def _code_styles(data: bytes, at: int) -> list[bytes]:
    """The levels, blocks and precincts in the main header and in those of tiles (SPcod of COD and COC)."""
    styles, tile = [], None
    for _ in range(2**17):
        marker, length = data[at : at + 2], int.from_bytes(data[at + 2 : at + 4])
        content = data[at + 4 : at + 2 + length]
        if marker == b"\xff\x52" and len(content) >= 10:
            styles.append(content[:1] + content[5:])
        elif marker == b"\xff\x53":
            several = 2 if len(data) > 42 and content[:1] == b"\0" and len(content) > 8 else 1
            styles += [content[several:], content[3 - several :]]  # of few components and of many
        elif marker == b"\xff\x90":
            tile = at + int.from_bytes(data[at + 6 : at + 10])
        elif marker == b"\xff\x93":
            if tile is None or tile <= at:
                break
            at = tile
            continue
        elif len(marker) < 2 or marker[0] != 0xFF:
            break
        at += 2 + max(2, length)
    return styles


def _parts(style: bytes, width: int, height: int) -> int:
    """The number of precincts and blocks of a component; `style` is that of a COD marker without its progression."""
    if len(style) < 4:
        return 0
    levels = min(style[1], 32)
    block = 2 ** (min(style[2], 8) + 2), 2 ** (min(style[3], 8) + 2)
    parts = -(-width // block[0]) * -(-height // block[1])
    for r in range(levels + 1):
        size = style[6 + r] if style[0] & 1 and len(style) > 6 + r else 0xFF
        across, down = 2 ** (levels - r + (size & 15)), 2 ** (levels - r + (size >> 4))
        parts += -(-width // across) * -(-height // down)
    return parts


def _pixmap(file: BinaryIO) -> str:
    file.seek(0)
    head = file.read(_HEAD)
    words = re.sub(rb"#[^\r\n]*[\r\n]?", b" ", head).split(maxsplit=4)
    if len(words) < (3 if words[:1] in ([b"P1"], [b"P4"]) else 4) and len(head) == _HEAD:
        return f"expected a header of {_HEAD} bytes at most, found more"
    if words[0] in (b"P1", b"P2", b"P3") and len(words) > 2 and all(word.isdigit() for word in words[1:3]):
        values = min(int(words[1][:9]), 2**31) * min(int(words[2][:9]), 2**31) * (3 if words[0] == b"P3" else 1)
        if values > MOST_PLAIN:
            return f"expected at most {MOST_PLAIN} values in plain text, found {values}"
    return ""
