"""How input is damaged: bytes as disks, networks and attackers do, and JSON values of all the wrong kinds."""

import copy
import json

import numpy as np

# Words that sizes and counts are tried with: little- and big-endian
_MAGIC = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]


def damage(rng: np.random.Generator, data: bytes) -> tuple[str, bytes]:
    """(what was done, the bytes afterwards), which are others than before."""
    while True:
        what, damaged = _damage(rng, data)
        if damaged != data:
            return what, damaged


def _damage(rng: np.random.Generator, data: bytes) -> tuple[str, bytes]:
    size = max(1, len(data))
    # Half of the places are in the first bytes, where headers are
    at = int(rng.integers(min(size, 512) if rng.random() < 0.5 else size))
    length = int(min(size - at, 1 << rng.integers(0, 13)))
    changed = bytearray(data)
    match rng.choice(["bit", "byte", "magic", "cut", "zeros", "noise", "remove", "double", "append", "swap"]):
        case "bit":
            changed[at : at + 1] = bytes([(data[at : at + 1] or b"\0")[0] ^ 1 << int(rng.integers(8))])
            return f"a bit at {at}", bytes(changed)
        case "byte":
            changed[at : at + 1] = bytes([int(rng.integers(256))])
            return f"a byte at {at}", bytes(changed)
        case "magic":
            word, width = _MAGIC[rng.integers(len(_MAGIC))], int(rng.choice([1, 2, 4, 8]))
            order = str(rng.choice(["little", "big"]))
            changed[at : at + width] = (word % 256**width).to_bytes(width, order)
            return f"the number {word} at {at}, {width} bytes {order}", bytes(changed)
        case "cut":
            return f"cut off at {at}", data[:at]
        case "zeros":
            changed[at : at + length] = bytes(length)
            return f"{length} zeros at {at}", bytes(changed)
        case "noise":
            changed[at : at + length] = rng.bytes(length)
            return f"{length} bytes of noise at {at}", bytes(changed)
        case "remove":
            return f"{length} bytes less at {at}", data[:at] + data[at + length :]
        case "double":
            return f"{length} bytes twice at {at}", data[: at + length] + data[at:]
        case "append":
            return f"{length} bytes more", data + rng.bytes(length)
    other = int(rng.integers(max(1, size - length)))
    changed[at : at + length], changed[other : other + length] = data[other : other + length], data[at : at + length]
    return f"{length} bytes of {at} and {other} swapped", bytes(changed)


def odd_value(rng: np.random.Generator):
    """A value that hardly anybody expects, for JSON with `dumps`."""
    values = [
        None, True, False, 0, 1, -1, 2, 10**18, -(10**18), 2**64, 10**400, 0.5, -0.0, 1e308, float("inf"),
        float("-inf"), float("nan"), "", "0", "x", "\0", "\x1b[2J", "\ud800", "\u202e", "../../etc/passwd", "/dev/zero",
        "gs://x/y", "https://example.com/x", "x" * 10_000, [], {}, [[]], [None], [-1], [0, 10**18], {"": None},
        {"x": {"y": []}}, _DEEP, ["x"] * 1000,
    ]  # fmt: skip
    return values[rng.integers(len(values))]


_DEEP = "\0deep\0"  # put in by `dumps`: Python's own encoder does not go so deep


def dumps(value, depth: int = 100_000) -> bytes:
    """JSON as UTF-8, or as near to it as half characters come; `odd_value`'s deepest with so many brackets."""
    text = json.dumps(value).replace(json.dumps(_DEEP), "[" * depth + "]" * depth)
    return text.encode("utf-8", "surrogatepass")


def odd_json(rng: np.random.Generator, value) -> tuple[str, object]:
    """(what was done, a copy of a JSON value in which one place, however deep, is another or is gone or new)."""
    changed = copy.deepcopy(value)
    places = list(_places(changed, ()))
    if not places:
        return "the whole value", odd_value(rng)
    path = places[rng.integers(len(places))]
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    key, odd = path[-1], odd_value(rng)
    match rng.choice(["value", "value", "value", "remove", "key", "neighbour"]):
        case "remove":
            del parent[key]
            return f"{path} removed", changed
        case "key" if isinstance(parent, dict):
            names = ["", "\x1b[31m", "a.b", "__class__", "\ud800", key.upper(), key + " ", "x" * 1000]
            name = names[rng.integers(len(names))]
            parent[name] = parent.pop(key)
            return f"{path} called {name[:20]!r}", changed
        case "neighbour":
            other = places[rng.integers(len(places))]
            found = value
            for step in other:
                found = found[step]
            parent[key] = copy.deepcopy(found)
            return f"{path} as {other}", changed
    parent[key] = odd
    return f"{path} = {str(odd)[:40]!r}", changed


def _places(value, path: tuple):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from _places(inner, (*path, key))
