"""The boxes of an mp4 (ISO/IEC 14496-12): is a fragmented file whole, and do headers count more than the file has?"""

import re
import struct

from voco_jax.data.container_headers import MOST_BEHIND, Enough, Headers, none


def check_boxes(headers: Headers) -> str:
    """Of a plain mp4 the header alone: it has a table of its frames, which FFmpeg reads (`video_file.py`). Of one in
    fragments all, also where its first frames, or all of them when it was finished, are in such a table."""
    at = 0
    while at < headers.size:
        kind, start, end = _box(headers, at)
        if end < start:  # no box
            return ""
        if kind == b"moov":
            if (short := headers.beyond(end)) or not _may_have_fragments(headers, start, end):
                return short
            return _check_fragments(headers)
        at = end
    return ""


def _may_have_fragments(headers: Headers, at: int, end: int) -> bool:
    """Whether a `moov` says that frames may be in fragments; FFmpeg reads none where it does not."""
    while at < end:
        kind, start, at = _box(headers, at)
        if kind == b"mvex" or at < start:
            return kind == b"mvex"
    return False


def _check_fragments(headers: Headers) -> str:
    at, movie, moofs, last, pointed = 0, b"", [], b"", set()
    while at < headers.size:
        kind, start, end = _box(headers, at)
        if kind == b"moov":
            movie = headers.read(start, min(end - start, 2**24))
        if not re.fullmatch(rb"[\w \-.\xa9]{4}", kind) or end < start:
            if headers.size - at < MOST_BEHIND and headers.read(at, 1) != b"\0":  # no small box begins there
                break
            return none("a box", at)
        if short := headers.beyond(end):
            return short
        if kind == b"moof":
            moofs.append((at, end))
        elif kind == b"sidx" and (
            short := headers.beyond(_end_of_segments(headers.read(start, min(end - start, 2**20)), end))
        ):
            return short
        elif kind == b"mfra":
            pointed = _moofs_of_index(headers.read(start, min(end - start, 2**24)))
        at, last = end, kind if kind not in (b"free", b"skip") else last
    if last == b"moof":
        return none("a box of data", headers.size)
    if lost := pointed - {begin for begin, _ in moofs}:
        return none("a fragment", min(lost))
    return _ends_early(movie, [headers.read(begin, min(end - begin, 2**22)) for begin, end in moofs[-8:]])


def _box(headers: Headers, at: int) -> tuple[bytes, int, int]:
    """(kind, start of the content, end). Where there is no box, the end is before the start."""
    data = headers.read(at, 16)
    if len(data) < 8:
        return b"", at, -1
    size, kind = int.from_bytes(data[:4]), data[4:8]
    if size == 1 and len(data) == 16:
        return kind, at + 16, at + int.from_bytes(data[8:16])
    return kind, at + 8, headers.size if size == 0 else at + size


def _end_of_segments(sidx: bytes, end: int) -> int:
    """The end of the last segment in an index that stands right before the segments."""
    width = 4 if sidx[:1] == b"\0" else 8
    at = 12 + 2 * width
    if len(sidx) < at + 4:
        return end
    first = int.from_bytes(sidx[12 + width : at])
    count = int.from_bytes(sidx[at + 2 : at + 4])
    sizes = struct.unpack_from(f">{3 * min(count, (len(sidx) - at - 4) // 12)}I", sidx, at + 4)[::3]
    return end + first + sum(size & 0x7FFFFFFF for size in sizes)


def _moofs_of_index(mfra: bytes) -> set[int]:
    """Where fragments begin, by the index at the file's end."""
    found, at = set(), 0
    while at + 8 <= len(mfra):
        size = max(8, int.from_bytes(mfra[at : at + 4]))
        if mfra[at + 4 : at + 8] == b"tfra" and at + 24 <= len(mfra):
            width = 8 if mfra[at + 8] else 4
            numbers = sum((mfra[at + 19] >> shift & 3) + 1 for shift in (0, 2, 4))
            for entry in range(at + 24, min(at + size, len(mfra)) - 2 * width - numbers + 1, 2 * width + numbers):
                found.add(int.from_bytes(mfra[entry + width : entry + 2 * width]))
        at += size
    return found


def _ends_early(movie: bytes, moofs: list[bytes]) -> str:
    """Compares the duration that a fragmented movie declares with the end of its last fragments."""
    declared, header = movie.find(b"mehd"), movie.find(b"mvhd")
    if declared < 0 or header < 0 or not moofs:
        return ""
    width = 8 if movie[declared + 4 : declared + 5] == b"\1" else 4
    duration = int.from_bytes(movie[declared + 8 : declared + 8 + width])
    place = header + (24 if movie[header + 4 : header + 5] == b"\1" else 16)
    scale = int.from_bytes(movie[place : place + 4])
    ends = [end for moof in moofs for end in _ends_of_tracks(moof, movie)]
    if not scale or not ends or max(ends) >= duration / scale - 0.1:
        return ""
    return f"expected {duration / scale:.2f} s, found {max(ends):.2f}"


def _ends_of_tracks(moof: bytes, movie: bytes) -> list[float]:
    """Seconds at which the fragments of a `moof` end; fragments without a start time are left out."""
    ends = []
    for traf in moof.split(b"traf")[1:]:
        tfhd, tfdt = traf.find(b"tfhd"), traf.find(b"tfdt")
        track = int.from_bytes(traf[tfhd + 8 : tfhd + 12])
        scale, default = _track(movie, track)
        if tfhd < 0 or tfdt < 0 or not scale:
            continue
        flags = int.from_bytes(traf[tfhd + 5 : tfhd + 8])
        at = tfhd + 12 + 8 * (flags & 1) + 4 * (flags >> 1 & 1)
        default = int.from_bytes(traf[at : at + 4]) if flags & 8 else default
        end = int.from_bytes(traf[tfdt + 8 : tfdt + (16 if traf[tfdt + 4 : tfdt + 5] == b"\1" else 12)])
        for run in traf.split(b"trun")[1:]:
            flags, count = int.from_bytes(run[1:4]), int.from_bytes(run[4:8])
            if not flags & 0x100:
                end += count * default
                continue
            step = 4 * sum(flags >> bit & 1 for bit in (8, 9, 10, 11))
            start = 8 + 4 * (flags & 1) + 4 * (flags >> 2 & 1)
            words = run[start : start + count * step]
            end += sum(int.from_bytes(words[i : i + 4]) for i in range(0, len(words), step))
        ends.append(end / scale)
    return ends


def _track(movie: bytes, track: int) -> tuple[int, int]:
    """(ticks per second of a track, default duration of a frame)."""
    scale = default = 0
    for trak in movie.split(b"trak")[1:]:
        tkhd, mdhd = trak.find(b"tkhd"), trak.find(b"mdhd")
        place = tkhd + (24 if trak[tkhd + 4 : tkhd + 5] == b"\1" else 16)
        if tkhd >= 0 and mdhd >= 0 and int.from_bytes(trak[place : place + 4]) == track:
            place = mdhd + (24 if trak[mdhd + 4 : mdhd + 5] == b"\1" else 16)
            scale = int.from_bytes(trak[place : place + 4])
    for trex in movie.split(b"trex")[1:]:
        if int.from_bytes(trex[4:8]) == track:
            default = int.from_bytes(trex[12:16])
    return scale, default


# ---- What a header would have FFmpeg do ----------------------------------------------------------------------------

MOST_MOVIE = 2**26  # bytes of a header that is compressed: a day's is less
# Boxes in which FFmpeg looks for boxes, ten deep at most
_OF_BOXES = frozenset(
    b"moov trak mdia minf stbl moof traf cmov mvex edts dinf udta ilst wave sinf schi tref ipro iprp".split()
)
_DEEPEST = 10


def check_counts(headers: Headers, fragments: bool = True) -> str:
    """'expected …, found …' where a header counts more frames than the file has bytes, or is compressed and too large:
    FFmpeg takes memory for all of it. '' for files of other kinds, too, and for what is behind as many boxes as
    `headers` may read. Without `fragments` nothing behind the movie's header is looked at.
    """
    counts, at = _Counts(headers), 0
    try:
        while at < headers.size:
            kind, start, end = _box(headers, at)
            if not re.fullmatch(rb"[\x20-\x7e\xa9]{4}", kind) or end < start:
                break  # not an mp4, or no longer
            if kind in (b"free", b"hoov") and headers.read(start + 4, 4) in (b"cmov", b"mvhd"):
                kind = b"moov"  # FFmpeg looks at one that was not finished, if there is no other
            if kind in _OF_BOXES and (wrong := counts.box(kind, start, min(end, headers.size), 0)):
                return wrong
            if kind == b"moov" and not fragments:
                break
            at = end
    except Enough:
        pass
    return ""


class _Counts:
    """Adds up the frames that boxes count. `box` and `boxes` return what is wrong, or ''."""

    def __init__(self, headers: Headers):
        self.headers, self.in_fragments = headers, 0
        self.handlers: set[bytes] = set()  # of a track
        self.by_sample, self.sizes = False, ""

    def boxes(self, at: int, end: int, depth: int) -> str:
        while at + 8 <= end and depth <= _DEEPEST:
            kind, start, stop = _box(self.headers, at)
            if stop < start:
                break
            stop = min(stop, end)  # of the box around it, as FFmpeg has it
            if wrong := self.box(kind, start, stop, depth):
                return wrong
            at = stop
        return ""

    def box(self, kind: bytes, start: int, end: int, depth: int) -> str:
        if kind == b"trak":
            self.handlers, self.by_sample, self.sizes = set(), False, ""
            wrong = self.boxes(start, end, depth + 1)
            # Sound of old QuickTime files counts samples, of which FFmpeg makes packets as it reads them
            packed = b"soun" in self.handlers and b"vide" not in self.handlers and not self.by_sample
            return wrong or ("" if packed else self.sizes)
        if kind in _OF_BOXES:
            return self.boxes(start, end, depth + 1)
        if kind == b"meta":
            place = self.headers.read(start, min(end - start, 2**12)).find(b"hdlr")
            return self.boxes(start + place - 4, end, depth + 1) if place >= 4 else ""
        if kind == b"stsd":  # of entries, with boxes behind what a picture or a sound has
            return next(
                filter(None, (self.boxes(start + 8 + skip, end, depth + 1) for skip in (86, 36, 52, 72, 16))), ""
            )
        return self.numbers(kind, start) if kind in (b"cmvd", b"stsz", b"trun", b"stts", b"hdlr") else ""

    def numbers(self, kind: bytes, start: int) -> str:
        size, words = self.headers.size, self.headers.read(start, 16).ljust(16, b"\0")
        first, second, third, fourth = struct.unpack(">4I", words)
        if kind == b"cmvd" and first > MOST_MOVIE:
            return f"expected a header of {MOST_MOVIE} bytes at most, found {first}, compressed"
        if kind == b"hdlr":
            self.handlers.add(words[8:12])
        elif kind == b"stts":
            self.by_sample |= not second == fourth == 1
        elif kind == b"stsz" and second * third > size:
            self.sizes = f"expected {size} bytes of frames at most, found {third} frames of {second}"
        elif kind == b"trun":
            self.in_fragments += second
            if self.in_fragments > size:
                return f"expected {size} frames at most, found {self.in_fragments}"
        return ""
