"""Scenes: pictures of a few objects, each in one of nine places. `make_scene_questions` asks about them.

Objects are drawn shapes (8 shapes, 8 colours, filled or outlined), or sprites: PNG files whose names say what they
show. Each has one of three sizes. Backgrounds are plain, graded, or photographs that come with scikit-image, dimmed.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import importlib.util
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from voco_jax.data.images import load_image
from voco_jax.errors import UserError
from voco_jax.outages import first_line

COLORS = {
    "red": (220, 30, 30), "orange": (250, 140, 10), "yellow": (245, 230, 40), "green": (30, 170, 50),
    "cyan": (40, 210, 220), "blue": (40, 70, 230), "purple": (140, 40, 190), "pink": (250, 130, 200),
}  # fmt: skip
PLACES = (
    "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right",
)  # fmt: skip  # row by row
SIDE = 3  # places in a row, and in a column
SIZES = {"small": 0.65, "medium": 0.8, "large": 1.0}  # an object's longer side, as a share of its place's
BACKGROUNDS = ("plain", "graded", "photo")
PHOTOS = ("astronaut.png", "brick.png", "chelsea.png", "coffee.png", "grass.png", "gravel.png", "rocket.jpg")
DIMMED = 0.45  # how much of a photograph's contrast is left, so that objects stand out
FINER = 4  # shapes are drawn at so many times the picture's size, and scaled down


def _star(points: int, inner: float) -> list[tuple[float, float]]:
    corners = ((1 if i % 2 == 0 else inner, math.pi * (i / points - 0.5)) for i in range(2 * points))
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in corners]


def _heart() -> list[tuple[float, float]]:
    turns = (2 * math.pi * i / 40 for i in range(40))
    return [
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 15)
        for t in turns
    ]


# Corners in a square from -1 to 1, x to the right and y downwards
SHAPES: dict[str, list[tuple[float, float]]] = {
    "circle": _star(32, 1.0),
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -0.95), (1, 0.85), (-1, 0.85)],
    "diamond": [(0, -1), (0.7, 0), (0, 1), (-0.7, 0)],
    "star": _star(5, 0.42),
    "cross": [
        (-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33),
        (0.33, 1), (-0.33, 1), (-0.33, 0.33), (-1, 0.33), (-1, -0.33), (-0.33, -0.33),
    ],
    "heart": _heart(),
    "arrow": [(1, 0), (0, -0.9), (0, -0.35), (-1, -0.35), (-1, 0.35), (0, 0.35), (0, 0.9)],
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Thing:
    """An object of a scene. `name` is a shape or a sprite's; `color` is '' of a sprite."""

    name: str
    color: str
    size: str
    filled: bool
    place: int  # of PLACES

    @property
    def adjective(self) -> str:
        """What can be said of it beside its name: its colour, or of a sprite its size."""
        return self.color or self.size

    @property
    def words(self) -> str:
        """What a question calls it."""
        return f"{self.color} {self.name}".strip()


@dataclasses.dataclass(frozen=True)
class World:
    """What there is to draw, and which pairs are held out: of colour and name, or, of sprites, of two names."""

    names: tuple[str, ...]
    colors: tuple[str, ...]
    held_out: frozenset[tuple[str, str]]
    sprites: Mapping[str, Path] | None = None

    @classmethod
    def make(cls, seed: int, sprites: Path | None = None) -> "World":
        """Each colour is held out with one shape; each sprite with one other."""
        rng = np.random.default_rng([seed])
        if sprites is None:
            names, colors = tuple(SHAPES), tuple(COLORS)
            pairs = zip(rng.permutation(colors).tolist(), names, strict=True)
            return cls(names, colors, frozenset(pairs))
        files = find_sprites(sprites)
        order = rng.permutation(list(files)).tolist()
        return cls(tuple(files), (), frozenset(zip(order[::2], order[1::2], strict=False)), files)


def find_sprites(directory: Path) -> dict[str, Path]:
    """PNG files by the words of their names ('red_apple.png': 'red apple'), sorted. UserError for fewer than four."""
    if not directory.is_dir():
        raise UserError(f"--sprites {directory}: expected a directory of PNG files, found none")
    files = sorted(path for path in directory.iterdir() if path.suffix.lower() == ".png")
    by_name: dict[str, Path] = {}
    for path in files:
        name = " ".join(path.stem.replace("_", " ").replace("-", " ").lower().split())
        if name in by_name:
            raise UserError(f"--sprites {directory}: {path.name} and {by_name[name].name}: both mean {name!r}")
        by_name[name] = path
    if len(by_name) < 4:
        raise UserError(f"--sprites {directory}: expected at least 4 PNG files, found {len(by_name)}")
    return by_name


def draw_things(rng: np.random.Generator, world: World, count: int, held_out: bool) -> list[Thing]:
    """So many objects in different places, with (`held_out`) or without a pair that is held out.

    Few names and colours are drawn from, so that some come several times. One object is often larger than all others.
    """
    places = rng.permutation(len(PLACES))[:count]
    most = "large" if rng.integers(2) else "medium"
    sizes = ["small" if most == "medium" else str(rng.choice(["small", "medium"])) for _ in range(count)]
    sizes[0] = most
    if rng.random() < 0.25:
        sizes = rng.choice(list(SIZES), count).tolist()
    what = _colored(rng, world, count, held_out) if world.colors else _sprites(rng, world, count, held_out)
    order = rng.permutation(count)
    return [Thing(what[j][1], what[j][0], sizes[i], bool(rng.integers(2)), int(places[i])) for i, j in enumerate(order)]


def _palette(rng: np.random.Generator, words: Sequence[str], count: int) -> list[str]:
    least, most = min(3, len(words)), min(len(words), count + 2)
    return rng.permutation(words)[: rng.integers(least, most + 1)].tolist()


def _colored(rng: np.random.Generator, world: World, count: int, held_out: bool) -> list[tuple[str, str]]:
    apart = sorted(world.held_out)
    colors, names = _palette(rng, world.colors, count), _palette(rng, world.names, count)
    known = [(color, name) for color in colors for name in names if (color, name) not in world.held_out]
    found = []
    for i in range(count):
        among = apart if held_out and (i == 0 or rng.integers(2)) else known
        found.append(among[rng.integers(len(among))])
    return found


def _sprites(rng: np.random.Generator, world: World, count: int, held_out: bool) -> list[tuple[str, str]]:
    pairs = sorted(world.held_out)
    partners = dict(pairs) | {b: a for a, b in pairs}
    names = _palette(rng, world.names, count)
    if held_out:
        pair = pairs[rng.integers(len(pairs))]
        return [("", name) for name in (*pair, *rng.choice(names, count - 2).tolist())]
    known = [name for i, name in enumerate(names) if partners.get(name) not in names[:i]]
    return [("", name) for name in rng.choice(known, count).tolist()]


# ---- Drawing ---------------------------------------------------------------------------------------------------


def draw(
    rng: np.random.Generator, world: World, things: Sequence[Thing], size: int, backgrounds: Sequence[str]
) -> Image.Image:
    """A picture [size, size] of a scene. An object is drawn anywhere in its place, and a sixth of the place beyond."""
    picture = background(rng, str(rng.choice(backgrounds)), size)
    cell = size / SIDE
    for thing in things:
        length = SIZES[thing.size] * cell
        free = max(cell - length, 0) / 2
        x, y = (cell * (i + 0.5) + rng.uniform(-free, free) for i in (thing.place % SIDE, thing.place // SIDE))
        if world.sprites is None:
            _draw_shape(picture, thing, x, y, length)
        else:
            _draw_sprite(picture, load_sprite(world.sprites[thing.name]), x, y, length)
    return picture


def _draw_shape(picture: Image.Image, thing: Thing, x: float, y: float, length: float) -> None:
    radius = FINER * length / 2
    mask = Image.new("L", (FINER * picture.width, FINER * picture.height))
    pen = ImageDraw.Draw(mask)
    corners = [(FINER * x + radius * dx, FINER * y + radius * dy) for dx, dy in SHAPES[thing.name]]
    pen.polygon(corners, fill=255)
    if not thing.filled:
        inside = Image.new("L", mask.size)
        ImageDraw.Draw(inside).polygon(corners, fill=255)
        width = max(round(0.22 * radius), FINER)
        pen.polygon(corners, fill=0)
        pen.line([*corners, corners[0], corners[1]], fill=255, width=2 * width)
        mask = Image.composite(mask, Image.new("L", mask.size), inside)
    mask = mask.reduce(FINER)
    picture.paste(COLORS[thing.color], (0, 0), mask)


@functools.cache
def load_sprite(path: Path) -> Image.Image:
    """RGBA, cut to what is not transparent. UserError for a file that is no picture, or is transparent throughout."""
    try:
        with Image.open(path) as opened:
            sprite = opened.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"--sprites {path}: not a picture that can be read ({first_line(error)})") from None
    box = sprite.getchannel("A").getbbox()
    if box is None:
        raise UserError(f"--sprites {path}: expected something to see, found a transparent picture")
    return sprite.crop(box)


def _draw_sprite(picture: Image.Image, sprite: Image.Image, x: float, y: float, length: float) -> None:
    scale = length / max(sprite.size)
    sized = sprite.resize((max(round(sprite.width * scale), 1), max(round(sprite.height * scale), 1)))
    picture.paste(sized, (round(x - sized.width / 2), round(y - sized.height / 2)), sized)


def background(rng: np.random.Generator, kind: str, size: int) -> Image.Image:
    """[size, size] in greys, or a photograph's colours with little contrast, so that no object is lost in it."""
    if kind == "photo":
        photos = photographs()
        photo = photos[rng.integers(len(photos))]
        side = int(rng.integers(min(size, *photo.size), min(photo.size) + 1))
        left, top = (int(rng.integers(free - side + 1)) for free in photo.size)
        crop = photo.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
        pixels = np.asarray(crop, np.float32)
        mean = rng.uniform(60, 200)
        return Image.fromarray((mean + DIMMED * (pixels - pixels.mean())).clip(0, 255).astype(np.uint8))
    shades = rng.uniform(20, 235, 2) + rng.uniform(-15, 15, (3, 2)) if kind == "graded" else None
    if shades is None:
        color = (rng.uniform(20, 235) + rng.uniform(-15, 15, 3)).clip(0, 255)
        return Image.new("RGB", (size, size), tuple(int(c) for c in color))
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[:size, :size] / size - 0.5
    ramp = (x * math.cos(angle) + y * math.sin(angle) + 0.7) / 1.4
    pixels = shades[:, 0] + (shades[:, 1] - shades[:, 0]) * ramp[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@functools.cache
def photographs() -> tuple[Image.Image, ...]:
    """Those of `PHOTOS`, RGB. UserError where scikit-image is not installed."""
    found = importlib.util.find_spec("skimage")
    if found is None or not found.submodule_search_locations:
        raise UserError(
            "--backgrounds: the package scikit-image, which has the photographs, is not installed; "
            "pip install -e '.[scenes]' brings it, or give --backgrounds plain graded"
        )
    directory = Path(found.submodule_search_locations[0]) / "data"
    return tuple(load_image(directory / name, transparency="drop") for name in PHOTOS)
