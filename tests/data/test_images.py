import dataclasses
import io
import struct
import zlib

import jax
import numpy as np
from PIL import Image
import pytest

from voco_jax.config import default_config
from voco_jax.data.from_config import make_processor
from voco_jax.data.images import ImageProcessor, is_picture, load_image, pad_to_square
from voco_jax.data.picture_headers import asks_too_much
from voco_jax.data.records import TOO_LARGE, BadRecord, Picture
from voco_jax.errors import UserError
from voco_jax.infer.memory import fingerprint
from voco_jax.models.llama import LlamaConfig
from voco_jax.models.vit import ViTConfig
from voco_jax.models.voco import VoCoConfig

MEAN_COLOUR = (122, 116, 104)


def halves(width: int, height: int) -> Image.Image:
    """Left half red, right half blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 255
    pixels[:, width // 2 :, 2] = 255
    return Image.fromarray(pixels)


def test_padding_stands_on_both_sides():
    square = np.asarray(pad_to_square(halves(8, 4), MEAN_COLOUR))
    assert square.shape == (8, 8, 3)
    assert (square[:2] == MEAN_COLOUR).all() and (square[6:] == MEAN_COLOUR).all()
    np.testing.assert_array_equal(square[2:6], np.asarray(halves(8, 4)))


def test_an_odd_row_of_padding_goes_below():
    square = np.asarray(pad_to_square(halves(8, 5), MEAN_COLOUR))
    assert (square[0] == MEAN_COLOUR).all() and (square[1] != MEAN_COLOUR).any()
    assert (square[6:] == MEAN_COLOUR).all()


@pytest.mark.parametrize("size", [(32, 16), (16, 32), (16, 16), (7, 31)])
@pytest.mark.parametrize("aspect_ratio", ["pad", "crop"])
def test_pixels_are_normalised(size, aspect_ratio):
    processor = ImageProcessor(16, aspect_ratio)
    white = processor(Image.new("RGB", size, (255, 255, 255)))
    assert white.shape == (16, 16, 3) and white.dtype == np.float32
    expected = (1 - np.array(processor.mean)) / np.array(processor.std)
    np.testing.assert_allclose(white[8, 8], expected, rtol=1e-6)
    padded = aspect_ratio == "pad" and size[0] != size[1]
    corner = (np.array(MEAN_COLOUR) / 255 - processor.mean) / processor.std if padded else expected
    np.testing.assert_allclose(white[0, 0], corner, atol=1e-6)


def test_pixels_normalised_on_a_device(picture):
    """Training sends grey levels to the devices and normalises them there."""
    processor = ImageProcessor(64)
    image = load_image(picture)
    on_device = jax.jit(processor.normalize)(processor.square(image))
    assert processor.square(image).dtype == np.uint8 and on_device.dtype == np.float32
    np.testing.assert_allclose(on_device, processor(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(90, 31), (31, 90), (16, 5), (5, 3), (200, 199), (64, 64), (640, 480), (7, 1)])
def test_padding_half_way_is_padding_first(size):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    expected = pad_to_square(noise, MEAN_COLOUR).resize((16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(ImageProcessor(16).square(noise), np.asarray(expected))


def test_cropping_takes_the_middle():
    pixels = ImageProcessor(8, "crop")(halves(24, 8))
    expected = ImageProcessor(8).normalize(np.asarray(halves(24, 8))[:, 8:16])
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"aspect_ratio": "squash"}, "aspect_ratio: expected pad, crop or stretch, found 'squash'"),
        ({"transparency": "black"}, "transparency: expected white or drop, found 'black'"),
        ({"resample": "cubic"}, "processor.resample: expected nearest or .*, found 'cubic'"),
        ({"resize_to": (0,)}, r"processor.resize_to: expected \(\) or \(side,\) or \(height, width\), found \(0,\)"),
        (
            {"aspect_ratio": "crop", "resize_to": (9, 8)},
            r"processor.resize_to: expected \(\) or \(side,\), found \(9, 8",
        ),
        ({"mean": (0.5, 0.5)}, "processor.image_mean: expected 3 numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "processor.image_std: expected 3 numbers above 0"),
        ({"rescale_factor": 0}, "processor.rescale_factor: expected above 0, found 0"),
        ({"pad_color": (1, 2, 256)}, "processor.pad_color: expected 3 grey levels of 0 … 255"),
    ],
)
def test_values_that_no_processor_has(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ImageProcessor(8, **fields)


RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def saved(image: Image.Image, format: str = "PNG", **options) -> bytes:
    content = io.BytesIO()
    image.save(content, format, **options)
    return content.getvalue()


def levels(picture, transparency: str = "white") -> list:
    """[width][3] of the first row."""
    return np.asarray(load_image(picture, transparency=transparency))[0].tolist()


def test_a_picture_is_the_same_however_it_comes(tmp_path):
    """Path, bytes, file object, PIL image (lazy, loaded, copied, converted) and array; lying on its side by EXIF."""
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8))
    exif = Image.Exif()
    exif[0x112] = 6
    for format in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if format == "WEBP" else {}
        content = saved(upright.transpose(Image.Transpose.ROTATE_90), format, exif=exif, **options)
        (tmp_path / "picture").write_bytes(content)
        loaded, used = Image.open(tmp_path / "picture"), io.BytesIO(content)
        loaded.load(), used.read()
        for picture in (
            tmp_path / "picture", str(tmp_path / "picture"), (tmp_path / "picture").as_uri(),
            content, bytearray(content), memoryview(content), used,
            io.BufferedReader(io.BytesIO(content)), Image.open(tmp_path / "picture"), loaded, loaded.copy(),
            Image.open(io.BytesIO(content)).convert("RGB"), upright, np.asarray(upright), jax.numpy.asarray(upright),
            np.asarray(upright) / 255, (np.asarray(upright) / 255).astype(np.float16),
            np.asarray(upright)[:, ::-1].copy()[:, ::-1], np.asarray(upright).astype(np.uint16) * 257,
        ):  # fmt: skip
            assert is_picture(picture)
            found = load_image(picture)
            assert found.mode == "RGB"
            np.testing.assert_array_equal(found, upright, f"{format} {type(picture)}")
            np.testing.assert_array_equal(load_image(found), upright)  # and is not turned again
    assert not is_picture([content]) and not is_picture(np.zeros((2, 4, 4, 3)))


def test_sixteen_bits_become_eight():
    deep = np.array([[0, 1000, 30000, 65535]], np.uint16)
    image, expected = Image.fromarray(deep), [[level] * 3 for level in (0, 3, 117, 255)]
    big_endian = Image.frombytes("I;16B", (4, 1), deep.astype(">u2").tobytes())
    for picture in deep, deep[..., None], image, saved(image), saved(image, "TIFF"), image.convert("I"), big_endian:
        assert levels(picture) == expected
    assert levels(saved(image, transparency=30000)) == [*expected[:2], [255] * 3, expected[3]]
    with pytest.raises(
        BadRecord, match=r"picture: not a readable picture \(expected grey levels of 0 … 65535, found -1"
    ):
        load_image(Image.fromarray(np.array([[-1, 70000]], np.int32)))


def test_floats_become_grey_levels():
    for values in [[0, 0.5, 1]], [[0, 127.9, 255]]:  # as scientific software writes them
        image = Image.fromarray(np.array(values, np.float32))
        assert (
            levels(saved(image, "TIFF"))
            == levels(image)
            == [[level] * 3 for level in (0, 128 if values[0][2] == 1 else 127, 255)]
        )
    for value in -1, 256, np.nan:
        with pytest.raises(BadRecord, match="expected values of 0 … 255, found"):
            load_image(Image.fromarray(np.array([[0, value]], np.float32)))


def transparent_pictures() -> dict:
    """A red pixel, and a blue one that nobody sees."""
    rgba = Image.fromarray(np.array([[[*RED, 255], [*BLUE, 0]]], np.uint8))
    palette = Image.frombytes("P", (2, 1), bytes([0, 1]))
    palette.putpalette([*RED, *BLUE])
    keyed = rgba.convert("RGB")
    keyed.info["transparency"] = BLUE
    return {
        "RGBA": rgba,
        "PNG": saved(rgba),
        "WebP": saved(rgba, "WEBP", lossless=True, exact=True),
        "array": np.asarray(rgba),
        "float array": np.asarray(rgba) / 255,
        "palette": saved(palette, transparency=1),
        "palette with alpha": saved(palette, transparency=bytes([255, 0])),
        "GIF": saved(palette, "GIF", transparency=1),
        "keyed": saved(rgba.convert("RGB"), transparency=BLUE),
        "keyed in memory": keyed,
        "premultiplied": Image.fromarray(np.array([[[*RED, 255], [0, 0, 0, 0]]], np.uint8)).convert("RGBa"),
    }  # fmt: skip


@pytest.mark.parametrize("name", transparent_pictures())
def test_transparency_is_white_or_dropped(name):
    picture = transparent_pictures()[name]
    assert levels(picture) == levels(picture, "white") == [list(RED), list(WHITE)]
    behind = [0, 0, 0] if name == "premultiplied" else list(BLUE)
    assert levels(picture, "drop") == [list(RED), behind]


def test_half_transparent_grey():
    picture = np.array([[[100, 255], [100, 0], [0, 128]]], np.uint8)
    expected = [[100] * 3, [255] * 3, [127] * 3]
    assert levels(picture) == levels(Image.fromarray(picture)) == levels(saved(Image.fromarray(picture))) == expected
    assert levels(picture, "drop") == [[100] * 3, [100] * 3, [0] * 3]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB", "RGBX", "PA", "La"])
def test_every_mode_shows_the_same_grey(mode):
    """Also in memory, as no file has it."""
    grey = Image.new("L", (5, 4), 255 if mode == "1" else 128)
    via = {"HSV": "RGB", "YCbCr": "RGB", "CMYK": "RGB", "RGBX": "RGB", "PA": "LA", "La": "LA"}.get(mode)
    image = (
        Image.new("LAB", (5, 4), (137, 128, 128))
        if mode == "LAB"
        else (grey.convert(via) if via else grey).convert(mode)
    )
    assert image.mode == mode
    found = load_image(image)
    assert found.mode == "RGB" and found.size == (5, 4)
    np.testing.assert_allclose(found, 255 if mode == "1" else 128, atol=1)


def test_what_is_not_a_picture_is_one_line():
    for picture, message in (
        (np.zeros((3, 8, 9)), "expected an array .height, width. or .height, width, 1 … 4., found float64 .3, 8, 9."),
        (np.zeros((0, 8, 3), np.uint8), "expected an array .* found uint8 .0, 8, 3."),
        (np.zeros((4, 4, 3), np.int32), "expected uint8, uint16, bool or float, found int32"),
        (np.full((4, 4), 1.5), "expected values of 0 … 1 in a float array, found float64 .4, 4. of 1.5 … 1.5"),
        (np.full((4, 4), np.nan, np.float32), "expected values of 0 … 1 in a float array"),
        (17, "expected a path, bytes, a binary file, a PIL image or an array; found int"),
        (io.StringIO("text"), "expected a path, .* found str"),
        (b"", "not a readable picture"),
        (b"GIF89a", "not a readable picture"),
        (Image.new("L", (20_000, 1)), "20000 × 1 pixels: expected 16384 at most .config.data.limits.picture_side., f"),
    ):
        with pytest.raises(BadRecord, match=f"^picture: {message}"):
            load_image(picture)


def test_unreadable_pictures(tmp_path, picture):
    with pytest.raises(UserError, match=r"nothing.png: not found$"):
        load_image(tmp_path / "nothing.png")
    with pytest.raises(BadRecord, match=r"https://a.org/b.png: web addresses are not fetched; download it first"):
        load_image("https://a.org/b.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match=r"text.png: not a readable picture \(.*\)$"):
        load_image(tmp_path / "text.png")
    (tmp_path / "program.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(UserError, match=r"program.jpg: not a readable picture \(of no known format\)"):
        load_image(tmp_path / "program.jpg")  # PostScript, which Pillow would have Ghostscript run
    (tmp_path / "half.png").write_bytes(picture.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"half.png: not a readable picture \(.*\)$"):
        load_image(tmp_path / "half.png")


# ---- Headers that ask for gigabytes, or minutes ---------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **settings)
    return content.getvalue()


def scans(count: int) -> bytes:
    """A JPEG of 1,000 x 1,000 pixels in 10 scans and `count` more."""
    data = encoded(Image.new("RGB", (1000, 1000)), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]


def tiff_tile(side: int, more: tuple = ()) -> bytes:
    packed = zlib.compress(bytes(min(side, 64) ** 2))
    tags = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, side), (323, side), (324, 8)]
    tags += [(325, len(packed)), *more]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<4sI", b"II*\0", 8 + len(packed)) + packed + struct.pack("<H", len(tags)) + entries + bytes(4)


def jpeg_2000(side: int, tile: int, precincts: bytes = b"", mode: str = "RGB") -> bytes:
    data = bytearray(encoded(Image.new(mode, (64, 64)), "JPEG2000", num_resolutions=2))
    at = data.index(b"\xff\x51")
    data[at + 6 : at + 14], data[at + 22 : at + 30] = struct.pack(">II", side, side), struct.pack(">II", tile, tile)
    if precincts:
        at = data.index(b"\xff\x52")
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        style = bytes([data[at + 4] | 1]) + data[at + 5 : end] + precincts
        data[at + 2 : end] = struct.pack(">H", len(style) + 2) + style
    return bytes(data)


def with_segments(count: int, segment: bytes) -> bytes:
    data = encoded(Image.new("RGB", (16, 16)), "JPEG")
    return data[:2] + segment * count + data[2:]


BOMBS = {
    "at most 536 scans of 1000000 pixels, found 610": lambda: scans(600),
    "tiles of 268435456 values at most, found 20000 x 20000": lambda: tiff_tile(20000),
    "tiles of 268435456 values at most, found 30000 x 30000": lambda: tiff_tile(30000, ((322, 16), (323, 16))),
    "tiles, precincts and blocks, found 243000000": lambda: jpeg_2000(9000, 1),
    "tiles, precincts and blocks, found 75": lambda: jpeg_2000(9000, 9000, b"\x11\x11"),
    "536 scans of 1000000 pixels, found 650": lambda: b"\xff\x02\xff\xda".join(scans(640).rsplit(b"\xff\xda", 640)),
    "65536 segments behind": lambda: scans(0)[:-2] + b"\xff\xe5\0\2" * 70_000 + b"\xff\xd9",
    "while decoded, found 1215000000: 9000 x 9000": lambda: jpeg_2000(9000, 2**31),
    "while decoded, found 980000000: 7000 x 7000": lambda: jpeg_2000(9000, 7000, mode="RGBA"),
    "65536 segments before": lambda: with_segments(70_000, b"\xff\xe5\0\2"),
    "33554432 bytes before": lambda: with_segments(600, b"\xff\xe1\xff\xffExif\0\0" + bytes(65527)),
    "262144 chunks": lambda: encoded(Image.new("L", (4, 4)), "PNG").replace(
        b"\0\0\0\0IEND", b"\0\0\0\0IDAT\x35\xaf\x06\x1e" * 300_000 + b"\0\0\0\0IEND"
    ),
    "a header of 4096 bytes": lambda: b"P6\n#" + b"x" * 10_000 + b"\n1 1 255\n123",
    "19000000 values": lambda: b"P3 3000 3000 255\n1 1 1",
}


@pytest.mark.parametrize("told", BOMBS)
def test_pictures_that_ask_too_much(told, tmp_path):
    (tmp_path / "a.png").write_bytes(BOMBS[told]())
    for picture in (tmp_path / "a.png", (tmp_path / "a.png").read_bytes()):
        with pytest.raises(BadRecord, match=f": expected .*{told}") as error:
            load_image(picture)
        assert error.value.kind == TOO_LARGE


def test_pictures_that_ask_much_and_not_too_much():
    for data in (scans(300), tiff_tile(64), jpeg_2000(64, 32, b"\x55\x66"), with_segments(400, b"\xff\xe5\0\2")):
        load_image(data)
    assert load_image(encoded(Image.new("LA", (600, 600), (50, 0)), "PNG")).getcolors() == [(360000, (255,) * 3)]


def noise(mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    return Image.fromarray(values).convert(mode).resize((96, 64))


def split_chunks(png: bytes, size: int) -> bytes:
    """A PNG with its pixels in chunks of so many bytes."""
    at, parts, pixels = 8, [], b""
    while at < len(png):
        length, kind = struct.unpack_from(">I4s", png, at)
        if kind == b"IDAT":
            pixels += png[at + 8 : at + 8 + length]
        else:
            parts.append(png[at : at + 12 + length])
        at += 12 + length
    pieces = [b"IDAT" + pixels[i : i + size] for i in range(0, len(pixels), size)]
    parts[-1:-1] = [struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in pieces]
    return png[:8] + b"".join(parts)


def other_pictures() -> bytes:
    """Behind the end of one: 2,000 small pictures and a megabyte of anything, as in a video."""
    return encoded(noise(), "JPEG", progressive=True) * 2000 + np.random.default_rng(1).bytes(2**20) + bytes(4 * 2**20)


def with_metadata() -> bytes:
    """A photo as phones write it: EXIF with its notes, extended XMP of 12 MB, a profile, bytes of 255 as filling."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x927C] = b"notes" * 10_000
    data = encoded(noise(), "JPEG", progressive=True, exif=exif, icc_profile=bytes(2**20))
    extended = b"http://ns.adobe.com/xmp/extension/\0" + b"\xff\xda" * 30_000
    segment = b"\xff\xe1" + struct.pack(">H", len(extended) + 2) + extended
    comment = b"\xff\xfe" + struct.pack(">H", 60_002) + b"x" * 60_000  # Pillow 12 has no room for it beside the others
    data = data[:2] + segment * 200 + comment + data[2:]
    return data.replace(b"\xff\xc4", b"\xff\xff\xff\xc4").replace(b"\xff\xda\0\x0c", b"\xff\xff\xda\0\x0c")


HONEST = {
    "a video behind a JPEG": lambda: encoded(noise(), "JPEG", quality=95) + other_pictures(),
    "a video behind a progressive JPEG": lambda: scans(0) + other_pictures(),
    "JPEG with restarts": lambda: encoded(noise(), "JPEG", progressive=True, restart_marker_blocks=1),
    "JPEGs one behind the other": lambda: encoded(noise(), "MPO", save_all=True, append_images=[noise()] * 40),
    "JPEG with metadata": with_metadata,
    "PNG of 20,000 chunks": lambda: split_chunks(encoded(noise().resize((200, 200)), "PNG", compress_level=0), 6),
    "a video behind a PNG": lambda: encoded(noise(), "PNG") + bytes(8 * 2**20) + other_pictures(),
    "TIFF of 4,000 strips": lambda: encoded(noise().resize((8, 4000)), "TIFF", strip_size=24),
    "BigTIFF": lambda: encoded(noise(), "TIFF", big_tiff=True, compression="tiff_lzw"),
    "TIFF in one tile": lambda: encoded(Image.new("L", (16384, 16)), "TIFF", tiffinfo={322: 16384, 323: 16}),
    "TIFF of many pages": lambda: encoded(noise(), "TIFF", save_all=True, append_images=[noise()] * 40),
    "WebP": lambda: encoded(noise(), "WEBP", exif=Image.Exif(), icc_profile=bytes(2**18), xmp=bytes(2**20)),
    "AVIF": lambda: encoded(noise(), "AVIF", icc_profile=bytes(2**18), xmp=bytes(2**20)),
    "JPEG 2000 of a GIS tool": lambda: encoded(
        noise().resize((2048, 1024)), "JPEG2000", tile_size=(256, 256), codeblock_size=(32, 32),
        precinct_size=(128, 128), num_resolutions=6, irreversible=True, quality_layers=[80, 40, 20],
    ),
    "JPEG 2000 of a camera": lambda: encoded(noise(), "JPEG2000", num_resolutions=4) + other_pictures(),
    "pixmap in plain text": lambda: b"P3\n# of a tool\n90 60\n255\n" + b"1 22 255\n" * 5400,
    "pixmap with bytes behind it": lambda: encoded(noise(), "PPM") + other_pictures(),
    "GIF": lambda: encoded(noise(), "GIF", save_all=True, append_images=[noise("L")] * 40) + other_pictures(),
    "BMP": lambda: encoded(noise(), "BMP") + other_pictures(),
}  # fmt: skip


@pytest.mark.parametrize("kind", HONEST)
def test_honest_pictures_are_read(kind):
    data = HONEST[kind]()
    assert load_image(data).size == Image.open(io.BytesIO(data)).size


def large_pictures() -> dict:
    """By their headers alone, as decoding them takes seconds."""
    cmyk = bytearray(encoded(noise("CMYK"), "JPEG", progressive=True))  # 18 scans
    at = cmyk.index(b"\xff\xc2") + 5
    cmyk[at : at + 4] = struct.pack(">HH", 8192, 8192)
    tags = [(256, 9450), (257, 9450), (322, 9456), (323, 9456), (277, 4)]
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return {
        "CMYK JPEG": bytes(cmyk),
        "TIFF in one tile": struct.pack("<4sIH", b"II*\0", 8, len(tags) // 12) + tags,
        "6 megapixels of colour in plain text": b"P3 3008 2000 255\n",
        "16 megapixels of grey in plain text": b"P2 4096 4096 255\n",
        "16 megapixels of black and white in plain text": b"P1 4096 4096\n",
    }


@pytest.mark.parametrize("kind", large_pictures())
def test_large_honest_pictures_are_not_refused(kind):
    assert asks_too_much(io.BytesIO(large_pictures()[kind])) == ""


def test_headers_that_are_cut_off():
    for data in (scans(0), tiff_tile(64), jpeg_2000(64, 32, b"\x55\x66"), encoded(Image.new("L", (4, 4)), "PNG")):
        for size in range(40):
            with pytest.raises(BadRecord):
                load_image(data[:size])


def test_limits_of_a_config():
    config = default_config()
    config.data.limits.update(picture_pixels=20_000, picture_side=20_000)
    processor = make_processor(config)
    assert processor.load(Picture(data=encoded(Image.new("L", (20_000, 1)), "PNG"))).size == (20_000, 1)
    with pytest.raises(BadRecord, match="200 × 101 pixels: expected 20000 at most .config.data.limits.picture_pixels"):
        processor.load(Picture(data=encoded(Image.new("L", (200, 101)), "PNG")))
    # Which pictures are read is no part of what a memory is of
    model, other = VoCoConfig(LlamaConfig(), ViTConfig(), voco_token_id=9), dataclasses.replace(processor, max_side=1)
    assert fingerprint(model, {}, processor) == fingerprint(model, {}, other)


def test_an_icon_larger_than_it_says():
    png = encoded(Image.new("1", (9500, 9500)), "PNG")
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png), 22) + png
    with pytest.raises(BadRecord, match="9500 × 9500 pixels"):
        load_image(icon)
