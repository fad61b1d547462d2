"""Is a video file whole? Checks for ivf, rm, swf and y4m, whose headers or frames declare a length or a count.

Live recordings declare 0 or a value that means unknown; then nothing is compared.
"""

import re

from voco_jax.data.container_headers import Headers, none

_UNKNOWN = {0, 0xFFFF, 2**32 - 1}  # what writers of ivf put there that cannot go back
_SWF_UNKNOWN = {0, 100 * 2**20, 2**32 - 1}  # FFmpeg's is 100 MiB


def ivf(headers: Headers) -> str:
    """Frames of declared sizes. The header has their number, or the ticks they take together, by who wrote it."""
    head = headers.read(0, 32)
    at = int.from_bytes(head[6:8], "little")
    times: list[int] = []
    while at < headers.size:
        frame = headers.read(at, 12)
        if not any(frame) or times and times[-1] and not any(frame[4:]):
            return none("a frame", at)
        times.append(int.from_bytes(frame[4:12], "little"))
        at += 12 + int.from_bytes(frame[:4], "little")
    if short := headers.beyond(at):
        return short
    rate, scale, declared = (int.from_bytes(head[i : i + 4], "little") for i in (16, 20, 24))
    if declared in _UNKNOWN or not times:
        return ""
    steps = [after - before for before, after in zip(times, times[1:], strict=False)]
    longest = max(steps, default=0)
    # Of frames of one duration each the last one's is known too; of others it may be shown long
    last = 1.5 * longest if steps and longest <= min(steps) + 1 else longest + rate / max(1, scale)
    if len(times) >= declared or max(times) + last >= declared:
        return ""
    return f"expected {declared} frames or units of time, found {len(times)} frames until {max(times)}"


def swf(headers: Headers) -> str:
    """Tags end with one of kind 0. Compressed files are not checked."""
    head = headers.read(0, 9)
    declared = int.from_bytes(head[4:8], "little")
    if head[:3] != b"FWS":
        return ""
    declared = 0 if declared in _SWF_UNKNOWN else declared
    if short := headers.beyond(declared):
        return short
    at = 8 + -(-(5 + 4 * (head[8] >> 3)) // 8) + 4 if len(head) == 9 else headers.size
    while at < headers.size:
        tag = headers.read(at, 6)
        kind, length = divmod(int.from_bytes(tag[:2], "little"), 64)
        if not kind:  # the end; but for zeros in place of more tags
            return none("a tag", at) if at + 2 < declared and not any(headers.read(at, 64)) else ""
        at += 2 + length if length < 63 else 6 + int.from_bytes(tag[2:6], "little")
    return headers.beyond(at)


def real_media(headers: Headers) -> str:
    """Chunks of declared sizes, and as many packets in those of data as these count."""
    at = 0
    while at < headers.size:
        chunk = headers.read(at, 18)
        kind, size = chunk[:4], int.from_bytes(chunk[4:8])
        if not re.fullmatch(rb"[\x21-\x7e]{4}", kind) or size < 10:  # behind the last one
            return ""
        if kind == b"DATA":
            packet, count = at + 18, int.from_bytes(chunk[10:14])
            if count and (short := headers.beyond(at + size - 18)):  # FFmpeg counts its header twice
                return short
            for _ in range(count):
                data = headers.read(packet, 4)
                length = int.from_bytes(data[2:4])
                if data[:1] != b"\0" or length < 12:
                    return none("a packet", packet)
                packet += length
            if short := headers.beyond(packet):
                return short
        elif short := headers.beyond(at + size):
            return short
        at += size
    return ""


# By how a colour space begins: values of a frame of w x h pixels, c being those of a plane at half of both sides
_PLANES = {"420": (1, 2, 2, 2), "422": (1, 2, 2, 1), "411": (1, 2, 4, 1), "444": (1, 2, 1, 1), "mono": (1, 0, 1, 1)}


def yuv4mpeg(headers: Headers) -> str:
    """Frames of one size, each after a header line."""
    head, end, _ = headers.read(0, 1024).partition(b"\n")
    fields = {field[:1]: field[1:] for field in head.decode("latin-1").split()[1:]}
    space = re.fullmatch(r"(420|422|411|444|mono)(alpha)?(?:p?(\d+)|jpeg|mpeg2|paldv)?", fields.get("C", "420"))
    if "C" not in fields and b" XYSCSS=" in head or not end or not space:
        return ""
    if not all(fields.get(side, "").isdecimal() for side in "WH"):
        return ""
    width, height = int(fields["W"]), int(fields["H"])
    luma, chroma, across, down = _PLANES[space[1]]
    values = (luma + bool(space[2])) * width * height + chroma * -(-width // across) * -(-height // down)
    frame = values * (2 if int(space[3] or 8) > 8 else 1)
    first = len(head) + 1
    # The last one, where no line has more than its word; else all
    at = first + max(0, headers.size - first - 1) // (6 + frame) * (6 + frame)
    if headers.read(at, 6) != b"FRAME\n":
        at = first
    while at < headers.size:
        line = headers.read(at, 1024).partition(b"\n")[0]
        if line[:5] != b"FRAME":
            return none("a frame", at)
        at += len(line) + 1 + frame
    return headers.beyond(at)
