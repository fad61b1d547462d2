import jax
import numpy as np
from PIL import Image
import pytest

from voco_jax.data.images import ImageProcessor, load_image, pad_to_square
from voco_jax.data.pipeline import stack_images
from voco_jax.errors import UserError

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


def test_unknown_aspect_ratio():
    with pytest.raises(ValueError, match="aspect_ratio: expected pad, crop or stretch, found 'squash'"):
        ImageProcessor(8, "squash")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16", "CMYK"])
def test_any_kind_of_picture_is_read_as_rgb(tmp_path, mode):
    file = tmp_path / ("picture.tiff" if mode in ("CMYK", "I;16") else "picture.png")
    Image.new(mode, (5, 4)).save(file)
    image = load_image(file)
    assert image.mode == "RGB" and image.size == (5, 4)


def test_sixteen_bits_become_eight(tmp_path):
    Image.fromarray(np.array([[0, 1000, 30000, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(load_image(tmp_path / "deep.png"))[0, :, 0].tolist() == [0, 3, 117, 255]


def test_unreadable_pictures(tmp_path, picture):
    with pytest.raises(UserError, match=r"nothing.png: not found$"):
        load_image(tmp_path / "nothing.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match=r"text.png: not a readable picture \(.*\)$"):
        load_image(tmp_path / "text.png")
    (tmp_path / "program.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(UserError, match=r"program.jpg: not a readable picture \(of no known format\)"):
        load_image(tmp_path / "program.jpg")  # PostScript, which Pillow would have Ghostscript run
    (tmp_path / "half.png").write_bytes(picture.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"half.png: not a readable picture \(.*\)$"):
        load_image(tmp_path / "half.png")


def test_places_without_a_picture_are_zero(picture):
    pixels = stack_images([load_image(picture)], 3, ImageProcessor(16))
    assert pixels.shape == (3, 16, 16, 3) and (pixels[1:] == 0).all() and (pixels[0] != 0).any()
    with pytest.raises(UserError, match=r"images_per_bin: expected at least 2, found 1"):
        stack_images([load_image(picture)] * 2, 1, ImageProcessor(16))
