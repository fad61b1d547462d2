"""Is a video's file whole? What its container says of sizes, durations and its index, compared with what is there.

FFmpeg reads a file that was cut off (a disk that was full, a copy that was interrupted, or has begun: then there may be
zeros at the end) as a shorter clip. Only headers of elements are read here, never what is in them, and a bounded number
of those. Where a container declares nothing, nothing can be told: live recordings of Matroska without sizes, mp4 cut
between two fragments without index or duration, transport streams cut between two of their packets, and streams
without a container.
"""

from collections.abc import Callable
import re
import struct
from typing import BinaryIO
import zlib

from voco_jax.data.container_headers import MOST_BEHIND, Enough, Headers, none
from voco_jax.data.declared_lengths import ivf, real_media, swf, yuv4mpeg
from voco_jax.data.mp4_boxes import check_boxes


def what_is_missing(file: BinaryIO, container: str, most: int) -> str:
    """'expected …, found …' for a file that is not whole; '' where it is, or nothing can be told from `most` headers.

    `container` is FFmpeg's name, also several with commas. The file is left where it stood.
    """
    check = next((_CHECKS[name] for name in container.split(",") if name in _CHECKS), None)
    if check is None:
        return ""
    stood = file.tell()
    try:
        return check(Headers(file, most))
    except Enough:
        return ""
    finally:
        file.seek(stood)


# ---- Matroska, WebM ------------------------------------------------------------------------------------------------

_FILE, _SEGMENT, _CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675
_ANYWHERE = {0xEC, 0xBF}  # void, CRC-32
_OF_SEGMENT = {  # info, seek head, tracks, cues, tags, chapters, attachments, signature
    _CLUSTER, 0x1549A966, 0x114D9B74, 0x1654AE6B, 0x1C53BB6B, 0x1254C367, 0x1043A770, 0x1941A469, 0x1B538667,
}  # fmt: skip
_OF_CLUSTER = {0xE7, 0xA3, 0xA0, 0xA7, 0xAB, 0xAF, 0xA2, 0x5854}  # time stamp, blocks, position, …


def _matroska(headers: Headers) -> str:
    at = 0
    while at < headers.size:
        found, start, length = _element(headers, at)
        if found not in {_FILE, _SEGMENT} | _ANYWHERE:  # something behind the last segment
            return ""
        if length is not None and (short := headers.beyond(start + length)):
            return short
        if found == _SEGMENT:
            wrong, at = _clusters(headers, start, headers.size if length is None else start + length, length is None)
            if wrong:
                return wrong
        elif length is None:
            return ""
        else:
            at = start + length
    return ""


def _clusters(headers: Headers, at: int, end: int, live: bool) -> tuple[str, int]:
    """What is wrong in a segment, whose blocks are looked at too, and where it ends.

    A `live` one has no length: it ends where another file begins, or with this one.
    """
    inner = 0  # where the cluster ends, in which we are; 0 outside
    while at < end:
        found, start, length = _element(headers, at)
        if live and found == _FILE:
            return "", at
        inside = at < inner and found not in _OF_SEGMENT
        if found is None or found not in _ANYWHERE | (_OF_CLUSTER if inside else _OF_SEGMENT):
            return none("a Matroska element", at), at
        if found == _CLUSTER:
            inner, at = end if length is None else start + length, start
            if inner > end:
                return headers.beyond(inner) or none("a whole cluster", at), at
            continue
        if length is None:
            return "", end
        at = start + length
        if at > (inner if inside else end):
            return headers.beyond(at) or none("a whole element", start), at
    return "", end


def _element(headers: Headers, at: int) -> tuple[int | None, int, int | None]:
    """ID, where its content begins, and its length; None for an invalid ID and for an unknown length."""
    data = headers.read(at, 12)
    width = 9 - data[0].bit_length() if data else 9
    if width > 4 or len(data) < width + 1:
        return None, at, None
    found, rest = int.from_bytes(data[:width]), data[width:]
    width_of_length = 9 - rest[0].bit_length()
    if width_of_length > 8 or len(rest) < width_of_length:
        return None, at, None
    length = int.from_bytes(rest[:width_of_length]) & ((1 << 7 * width_of_length) - 1)
    unknown = length == (1 << 7 * width_of_length) - 1
    return found, at + width + width_of_length, None if unknown else length


# ---- RIFF: avi -----------------------------------------------------------------------------------------------------


_SLACK = 256  # bytes that a RIFF part may be too long, where its index is whole


def _avi(headers: Headers) -> str:
    at, parts = 0, []
    while at < headers.size:
        kind, size = _chunk(headers, at)
        if kind != b"RIFF" or size in (0, 2**32 - 1):  # behind the last; or never closed, as a recorder was killed
            break
        end = at + 8 + size
        if end > headers.size + _SLACK:
            return headers.beyond(end)
        parts.append((at, end))
        at = end + end % 2
    if parts and at < headers.size and _more_parts(headers) and not any(headers.read(at, 64)):
        return none("another part", at)
    for at, end in parts:  # first what is far from each other: the index may stand at the end of gigabytes
        kinds: set[bytes] = set()
        wrong = _avi_chunks(headers, at + 12, min(end, headers.size), kinds, deep=False)
        if wrong or b"idx1" not in kinds and (wrong := headers.beyond(end)):
            return wrong
    return next(filter(None, (_avi_chunks(headers, at + 12, end, set(), deep=True) for at, end in parts)), "")


def _more_parts(headers: Headers) -> bool:
    """Whether the header says that the file has more frames than its first part."""
    data = headers.read(0, 2**14)
    first, every = data.find(b"avih"), data.find(b"dmlh")
    if first < 0 or every < 0:
        return False
    return int.from_bytes(data[every + 8 : every + 12], "little") > int.from_bytes(
        data[first + 24 : first + 28], "little"
    )


def _avi_chunks(headers: Headers, at: int, end: int, kinds: set[bytes], deep: bool) -> str:
    """What is wrong with the chunks of a list; with `deep`, those of frames too. The kinds go into `kinds`."""
    while at + 8 <= min(end, headers.size):
        kind, size = _chunk(headers, at)
        kinds.add(kind)
        if not re.fullmatch(rb"[\x20-\x7e]{4}", kind):
            return none("a chunk", at)
        if at + 8 + size > end:
            return none("a whole chunk", at)
        if kind == b"LIST" and headers.read(at + 8, 4) in (b"movi", b"rec "):
            if size < 4:  # never closed
                kinds.add(b"idx1")
                return ""
            if deep and (wrong := _avi_chunks(headers, at + 12, at + 8 + size, set(), deep)):
                return wrong
        at += 8 + size + size % 2
    return ""


def _chunk(headers: Headers, at: int) -> tuple[bytes, int]:
    data = headers.read(at, 8)
    return data[:4], int.from_bytes(data[4:8], "little")


# ---- Others --------------------------------------------------------------------------------------------------------


def _flv(headers: Headers) -> str:
    data = headers.read(0, 9)
    at = int.from_bytes(data[5:9]) + 4
    first = headers.read(at, 2**16)
    if (size := _number_in_script(first, b"filesize")) and (short := headers.beyond(int(size))):
        return short
    duration, time, gap = _number_in_script(first, b"duration"), 0.0, 1.0
    while at < headers.size:
        tag = headers.read(at, 11)
        if tag[0] & 0x1F not in (8, 9, 18, 15):
            if size and at >= size or any(tag) and headers.size - at < MOST_BEHIND:
                break  # behind the end
            return none("a tag", at)
        if len(tag) < 11:
            return headers.beyond(at + 11)
        end = at + 11 + int.from_bytes(tag[1:4])
        if short := headers.beyond(end):
            return short
        now = int.from_bytes(tag[7:8] + tag[4:7]) / 1000
        if tag[0] & 0x1F == 9:
            gap = max(gap, now - time)  # the last frame is shown as long as any, at most
        time, at = max(time, now), end + 4
    return f"expected {duration:.2f} s, found {time:.2f}" if time + gap + 0.1 < duration else ""


def _number_in_script(script: bytes, name: bytes) -> float:
    """A number in the first tag of an FLV file; 0.0 where it has none."""
    at = script.find(len(name).to_bytes(2) + name + b"\0") + len(name) + 3
    if at < len(name) + 3 or len(script) < at + 8:
        return 0.0
    value = struct.unpack_from(">d", script, at)[0]
    return value if 0 < value < 2**62 else 0.0


def _asf(headers: Headers) -> str:
    """The file properties hold the sizes of the file and of its packets, except for a broadcast."""
    data = headers.read(0, 2**16)
    at = data.find(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))
    if at < 0 or len(data) < at + 92 or data[at + 88] & 1:
        return ""
    if short := headers.beyond(int.from_bytes(data[at + 40 : at + 48], "little")):
        return short
    count, size = int.from_bytes(data[at + 56 : at + 64], "little"), int.from_bytes(data[at + 92 : at + 96], "little")
    first = data.find(bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")) + 50
    for packet in range(first, first + count * size, size) if first >= 50 and size else ():
        if headers.read(packet, 1) in (b"", b"\0"):
            return none("a packet", packet)
    return ""


_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg(headers: Headers) -> str:
    """Pages are numbered without gaps, and the last is whole. A live recording has no page marked as the last."""
    at, last = 0, 0
    numbers: dict[bytes, int] = {}
    try:
        while at < headers.size:
            last, page = at, headers.read(at, 282)
            if page[:4] != b"OggS":
                return none("a page", at)
            if len(page) < 27 + (page + bytes(27))[26]:
                return headers.beyond(headers.size + 1)
            serial, number = page[14:18], int.from_bytes(page[18:22], "little")
            if number != numbers.get(serial, number - 1) + 1 and not page[5] & 2:  # 2: a stream begins
                return f"expected page {numbers[serial] + 1} at byte {at}, found {number}"
            numbers[serial] = number
            at += 27 + page[26] + sum(page[27 : 27 + page[26]])
        return headers.beyond(at) or _last_page(headers.read(last, at - last))
    except Enough:
        headers.left = 1
    # Of a long one, the end
    length = min(headers.size, 2 * 65307)
    start = headers.size - length
    tail = headers.read(start, length)
    at, last = tail.find(b"OggS"), -1
    while at >= 0 and len(tail) >= at + 27:
        segments = tail[at + 27 : at + 27 + tail[at + 26]]
        end = at + 27 + tail[at + 26] + sum(segments)
        if end > len(tail) or len(segments) < tail[at + 26]:
            return headers.beyond(max(start + end, headers.size + 1))
        if tail[end : end + 4] not in (b"OggS", b""):
            at = tail.find(b"OggS", at + 1)  # not a page's beginning, or something between two
            continue
        last, at = at, end if end < len(tail) else -1
    return headers.beyond(start + at + 27) if at >= 0 else _last_page(tail[last:] if last >= 0 else bytes(27))


def _last_page(page: bytes) -> str:
    # Its checksum is a CRC-32 whose bits go the other way than zlib's, and that begins and ends with zeros
    without = (page[:22] + bytes(4) + page[26:]).translate(_MIRRORED)
    if (zlib.crc32(without, 2**32 - 1) ^ (2**32 - 1)).to_bytes(4).translate(_MIRRORED) != page[22:26]:
        return "expected a page by its checksum, found another at the end"
    return ""


def _gif(headers: Headers) -> str:
    screen = headers.read(0, 13)
    at = 13 + (3 * 2 ** ((screen[10] & 7) + 1) if len(screen) == 13 and screen[10] & 0x80 else 0)
    while at < headers.size:
        block = headers.read(at, 10)
        if block[:1] == b";":
            return ""
        if block[:1] == b"\0":  # more ends of blocks than there are blocks
            zeros = headers.read(at, 2**16)
            at += len(zeros) - len(zeros.lstrip(b"\0"))
            if at == headers.size:
                break
            continue
        if block[:1] == b",":
            at += 11 + (3 * 2 ** ((block[9] & 7) + 1) if len(block) == 10 and block[9] & 0x80 else 0)
        elif block[:1] == b"!":
            at += 2
        else:
            return none("a block", at)
        while length := headers.read(at, 1):
            at += 1 + length[0]
            if not length[0]:
                break
        if length and at == headers.size:  # all is there but the last byte
            return ""
    return none("the end of the pictures", headers.size)


def _apng(headers: Headers) -> str:
    at, count, frames = 8, 0, 0
    while at < headers.size:
        data = headers.read(at, 12)
        kind, end = data[4:8], at + 12 + int.from_bytes(data[:4])
        if short := headers.beyond(end):
            return short
        if kind == b"IEND":
            return f"expected {frames} frames, found {count}" if count < frames else ""
        count += kind == b"fcTL"
        frames = int.from_bytes(data[8:12]) if kind == b"acTL" else frames
        at = end
    return none("the end of the pictures", at)


def _mpegts(headers: Headers) -> str:
    """Packets of one size, each with a sync byte. A recording may stop in the middle of a packet."""
    head = headers.read(0, 5 * 204)
    for size, first in ((188, 0), (192, 4), (204, 0)):
        if all(head[i : i + 1] == b"G" for i in range(first, len(head) - size + first + 1, size)):
            whole = headers.size // size * size
            last = headers.read(whole - size + first, 188)
            filled = last[1:2] + last[2:3] == b"\x1f\xff" or any(last[-64:])  # the null packet may have zeros in it
            return "" if last[:1] == b"G" and filled else none("a packet", whole - size)
    return ""


def _mpeg(headers: Headers) -> str:
    """Every packet after the last pack header is there and not empty."""
    length = min(headers.size, 2**18)
    tail, start = headers.read(headers.size - length, length), headers.size - length
    if not any(tail[-64:]):
        last = tail.rstrip(b"\0")
        return "" if last.endswith(b"\0\0\1\xb9") else none("a packet", start + len(last))
    at = tail.rfind(b"\0\0\1\xba")
    while 0 <= at < len(tail):
        if tail[at : at + 4] == b"\0\0\1\xba":
            if at + 14 > len(tail):
                return headers.beyond(start + at + 14)
            at += 12 if tail[at + 4] >> 4 == 2 else 14 + (tail[at + 13] & 7)
        elif tail[at : at + 4] == b"\0\0\1\xb9":
            return ""
        elif tail[at : at + 3] == b"\0\0\1" and at + 6 <= len(tail):
            at += 6 + int.from_bytes(tail[at + 4 : at + 6])
        else:
            return "" if at + 6 <= len(tail) else headers.beyond(start + at + 6)
    return headers.beyond(start + at) if at >= 0 else ""


def _mxf(headers: Headers) -> str:
    """Keys, lengths and values follow each other; a file that says it is closed has a footer."""
    at = headers.read(0, 2**16).find(bytes.fromhex("060e2b34020501010d0102010102"))
    while 0 <= at < headers.size:
        data = headers.read(at, 64)
        if data[:4] != b"\x06\x0e\x2b\x34":
            return none("a key", at) if len(data) < 16 or not any(data[:16]) else ""
        if len(data) < 17:
            return headers.beyond(at + 17)
        width = data[16] & 0x7F if data[16] & 0x80 else 0
        start = at + 17 + width
        end = start + (int.from_bytes(data[17 : 17 + width]) if width else data[16])
        footer = int.from_bytes(data[start - at + 24 : start - at + 32])
        if data[4:14] == bytes.fromhex("020501010d0102010102")[:10] and data[13] == 2 and footer >= headers.size:
            return headers.beyond(footer + 1)
        if short := headers.beyond(end):
            return short
        at = end
    return ""


_CHECKS: dict[str, Callable[[Headers], str]] = {
    "mov": check_boxes, "matroska": _matroska, "avi": _avi, "flv": _flv, "live_flv": _flv, "asf": _asf, "ogg": _ogg,
    "gif": _gif, "apng": _apng, "mpegts": _mpegts, "mpeg": _mpeg, "mxf": _mxf, "ivf": ivf,
    "swf": swf, "rm": real_media, "yuv4mpegpipe": yuv4mpeg,
}  # fmt: skip
