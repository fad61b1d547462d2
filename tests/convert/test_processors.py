"""Image processors of checkpoints: the pixels are transformers' own on Pillow, or the key is named."""

import dataclasses
import json

import numpy as np
from PIL import Image
import pytest
import transformers

from voco_jax.checkpoint.init_from import begin_with_run, other_pixels
from voco_jax.config import default_config, first_difference, load_config, save_config
from voco_jax.convert.processors import (
    processor_from_hf,
    processor_of_llava,
    processor_of_llava_hf,
    processor_of_tower,
    processor_to_hf,
)
from voco_jax.convert.sources import Source
from voco_jax.convert.to_jax import Options, run_config
from voco_jax.data.from_config import make_processor, set_processor
from voco_jax.data.images import ImageProcessor, pad_to_square
from voco_jax.data.tokenizer import save_tokenizer
from voco_jax.errors import UserError
from voco_jax.infer.memory import fingerprint
from voco_jax.models.linear import LoRAConfig
from voco_jax.models.llama import LlamaConfig, RopeScaling
from voco_jax.models.vit import ViTConfig
from voco_jax.models.voco import VoCoConfig

SIZE = 28  # of the vision tower
VISION = ViTConfig(
    image_size=SIZE, patch_size=14, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
)
CLIP = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIZE}, "crop_size": SIZE}
LLAVA = CLIP | {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
SIGLIP = {"image_processor_type": "SiglipImageProcessor", "size": {"height": SIZE, "width": SIZE}}

PROCESSORS = {
    "CLIP": CLIP,
    "fast": CLIP | {"image_processor_type": "CLIPImageProcessorFast", "crop_size": {"height": SIZE, "width": SIZE}},
    "old": {"feature_extractor_type": "CLIPFeatureExtractor", "size": SIZE, "crop_size": SIZE, "resample": 2},
    "larger": CLIP | {"size": {"shortest_edge": 41}, "image_mean": [0.5, 0.4, 0.3], "image_std": 0.25},
    "smaller": CLIP | {"size": {"shortest_edge": 19}, "resample": 0},  # with a border
    "stretched": CLIP | {"size": {"height": 20, "width": 45}, "resample": 5},
    "stretched square": CLIP
    | {"size": [SIZE, SIZE], "default_to_square": True, "do_center_crop": False, "resample": 4},
    "list": CLIP | {"size": [35, 30], "crop_size": [SIZE, SIZE], "do_rescale": False},
    "middle": CLIP | {"do_resize": False, "rescale_factor": 1 / 127.5},
    "raw": CLIP | {"do_normalize": False, "do_rescale": False, "do_pad": True},  # which is no padding for CLIP
    "padded": LLAVA,
    "padded and cropped": LLAVA | {"size": {"shortest_edge": 33}, "resample": 1, "do_flip_channel_order": False},
    "padded to a strip": LLAVA | {"size": {"height": 30, "width": 50}},
    "padded as it is": LLAVA | {"do_resize": False, "image_mean": [0.9, 0.5, 0.1]},
    "padded, not normalised": LLAVA | {"do_normalize": False, "do_center_crop": None},
    "unpadded": LLAVA | {"do_pad": False, "processor_class": "LlavaProcessor"},
    "SigLIP": SIGLIP | {"do_convert_rgb": None},
    "SigLIP, other grey": SIGLIP | {"image_mean": [0.48, 0.46, 0.41], "resample": 2, "rescale_factor": 0.004},
    "SigLIP 2": SIGLIP | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "do_convert_rgb": None},
    "SigLIP, padded": LLAVA | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2},
    "SigLIP, cropped": CLIP | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
}


def theirs(fields: dict):
    """transformers' own class on Pillow, for which the first versions 5 have no name of its own."""
    named = fields.get("image_processor_type", "CLIPImageProcessor").removesuffix("Fast")
    return getattr(transformers, f"{named}Pil", None) or getattr(transformers, named)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def sizes(seed: int) -> list[tuple[int, int]]:
    """Those that were one pixel short in some version, slim and tiny ones, and random ones."""
    rng = np.random.default_rng(seed)
    drawn = np.exp(rng.uniform(0, np.log(450), (12, 2))).astype(int) + rng.integers(0, 2)
    return [(720, 480), (639, 426), (410, 615), (1, 90), (SIZE, SIZE), *map(tuple, drawn.tolist())]


@pytest.mark.parametrize("name", ["padded", "padded as it is", "padded and cropped"])
@pytest.mark.parametrize("size", [(3, 2048), (2049, 2), (700, 2301), (2500, 2400), (2048, 2048)])
def test_large_squares_are_padded_in_parts(name, size):
    """Which are not made whole, and are the same to a grey level."""
    processor = processor_from_hf(PROCESSORS[name], "", SIZE)
    picture = noise(*size)
    whole = pad_to_square(picture, processor.colour)
    assert np.array_equal(
        processor.square(picture), dataclasses.replace(processor, aspect_ratio="stretch").square(whole)
    )


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_transformers(name):
    """On 17 sizes each: the same grey levels, and float values to a rounding; so does what `to-hf` writes of it."""
    fields = PROCESSORS[name]
    ours = processor_from_hf(fields, "", SIZE)
    written = processor_to_hf(ours, None, "llava-hf")
    assert processor_from_hf(written, "", SIZE) == ours
    whole, levels = theirs(fields)(**fields), theirs(written)(**written | {"do_rescale": False, "do_normalize": False})
    for i, size in enumerate(sizes(list(PROCESSORS).index(name))):
        image = noise(*size, seed=i)
        expected = levels(image, return_tensors="np", input_data_format="channels_last")["pixel_values"][0].transpose(
            1, 2, 0
        )
        np.testing.assert_array_equal(ours.square(image), expected, str(size))
        expected = whole(image, return_tensors="np", input_data_format="channels_last")["pixel_values"][0].transpose(
            1, 2, 0
        )
        np.testing.assert_allclose(ours(image), expected, rtol=1e-6, atol=1e-6, err_msg=str(size))


def test_the_resized_side_is_rounded_as_theirs():
    """336 · 720 / 480 is 504, and 720 · (336 / 480) is 503.99…"""
    for (width, height), resized in {(720, 480): 504, (639, 426): 504, (615, 410): 504}.items():
        assert ImageProcessor(336, "crop")._resized((width, height)) == (resized, 336)
        assert ImageProcessor(336, "crop")._resized((height, width)) == (336, resized)


def test_a_line_is_resized_in_part(monkeypatch):
    """Where all of it would take gigabytes; the levels are the same."""
    for size in (900, 10), (7, 900), (1, 400):
        for processor in (
            ImageProcessor(SIZE, "crop"),
            ImageProcessor(SIZE, "crop", resize_to=(40,), resample="lanczos"),
        ):
            expected = processor.square(noise(*size)).astype(int)
            with monkeypatch.context() as patch:
                patch.setattr("voco_jax.data.images._MAX_RESIZED", 1)
                assert np.abs(processor.square(noise(*size)) - expected).max() <= 1


@pytest.mark.parametrize(
    "fields, message",
    {
        "resample": (CLIP | {"resample": 9}, "resample: expected one of Pillow's filters, 0 … .; found 9"),
        "type": ({"image_processor_type": "BitImageProcessor"}, "image_processor_type: expected CLIPImage.*'BitImage"),
        "unknown": (
            CLIP | {"do_thumbnail": True},
            "do_thumbnail: unknown, and may .*; found True .*--ignore-key do_thumb",
        ),
        "code": (CLIP | {"auto_map": {"AutoImageProcessor": "x.Y"}}, "auto_map: unknown, .*x.Y"),
        "grid": (CLIP | {"image_grid_pinpoints": [[336, 672]]}, "image_grid_pinpoints: unknown"),
        "longest": (
            CLIP | {"size": {"shortest_edge": 28, "longest_edge": 40}},
            "size: expected height and width in.*40",
        ),
        "size": (
            CLIP | {"size": 28.5},
            "size: expected height and width in pixels, or shortest_edge alone; found 28.5",
        ),
        "crop": (CLIP | {"crop_size": 24}, "crop_size: expected 28 × 28 pixels, as the vision tower takes; found 24"),
        "any shape": (CLIP | {"do_center_crop": False}, "do_center_crop: expected true, or a size with height"),
        "no crop": (SIGLIP | {"size": {"height": 28, "width": 32}}, "size: expected 28 × 28 pixels.*found .*32"),
        "pad_size": (CLIP | {"do_pad": True, "pad_size": {"height": 28, "width": 30}}, "pad_size: expected 28 × 28"),
        "square": (CLIP | {"use_square_size": True}, "use_square_size: expected false; found True"),
        "number": (CLIP | {"size": 28, "default_to_square": True}, "default_to_square: expected false, or a size with"),
        "flag": (CLIP | {"do_rescale": "yes"}, "do_rescale: expected true or false; found 'yes'"),
        "mean": (CLIP | {"image_mean": [0.5, 0.5]}, r"image_mean: expected 3 numbers; found \[0.5, 0.5\]"),
        "std": (CLIP | {"image_std": [0.5, 0, 0.5]}, "image_std: expected 3 numbers above 0, found"),
        "colour": (LLAVA | {"image_mean": [122, 116, 104]}, "pad_color: expected 3 grey levels of 0 … 255"),
        "factor": (CLIP | {"rescale_factor": "1/255"}, "rescale_factor: expected a number; found '1/255'"),
    }.values(),
)
def test_what_is_not_computed_is_refused_by_name(fields, message):
    with pytest.raises(UserError, match=f"^file: {message}"):
        processor_from_hf(fields, "file: ", SIZE)


def test_how_tiles_are_cut_is_named_by_the_first_llava_next():
    """In the files of all its checkpoints; no version of transformers reads the key."""
    fields = CLIP | {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": [[28, 56]]}
    named = fields | {"aspect_ratio_setting": "anyres"}
    assert processor_from_hf(named, "file: ", SIZE) == processor_from_hf(fields, "file: ", SIZE)
    for other in (fields | {"aspect_ratio_setting": "pad"}, CLIP | {"aspect_ratio_setting": "anyres"}):
        with pytest.raises(UserError, match="^file: aspect_ratio_setting: .*found"):
            processor_from_hf(other, "file: ", SIZE)


def write(directory, **files) -> None:
    directory.mkdir(exist_ok=True)
    for name, fields in files.items():
        (directory / f"{name}.json").write_text(json.dumps(fields))


def test_which_file_counts(tmp_path):
    """Of a Hugging Face LLaVA that of transformers 5 first, as it does itself."""
    assert processor_of_llava_hf(tmp_path, VISION) == ImageProcessor(SIZE, "pad", transparency="white")
    write(tmp_path, preprocessor_config=CLIP)
    write(tmp_path, processor_config={"patch_size": 14, "image_token": "<image>", "processor_class": "LlavaProcessor"})
    assert processor_of_llava_hf(tmp_path, VISION).aspect_ratio == "crop"
    write(tmp_path, processor_config={"image_processor": SIGLIP, "vision_feature_select_strategy": "default"})
    found = processor_of_llava_hf(tmp_path, VISION)
    assert found == ImageProcessor(SIZE, "stretch", (0.5,) * 3, (0.5,) * 3, transparency="white")
    untyped = {key: value for key, value in LLAVA.items() if key != "image_processor_type"}
    write(tmp_path, processor_config={"image_processor": untyped})
    assert processor_of_llava_hf(tmp_path, VISION).aspect_ratio == "pad"
    for key, value in ("patch_size", 16), ("vision_feature_select_strategy", "full"), ("num_tiles", 4):
        write(tmp_path, processor_config={"image_processor": CLIP, key: value})
        with pytest.raises(UserError, match=f"processor_config.json: {key}: .* found {value!r}"):
            processor_of_llava_hf(tmp_path, VISION)
    write(tmp_path, processor_config={"image_processor": CLIP | {"do_tile": True}})
    with pytest.raises(UserError, match="processor_config.json: image_processor.do_tile: unknown"):
        processor_of_llava_hf(tmp_path, VISION)
    assert processor_of_llava_hf(tmp_path, VISION, ["do_tile"]).aspect_ratio == "crop"


def test_a_released_llava_pads_before_its_towers_processor(tmp_path):
    config, tower = tmp_path / "config.json", tmp_path / "tower"
    released = ImageProcessor(SIZE, "pad")  # which drops transparency
    assert processor_of_llava({"image_aspect_ratio": "pad"}, config, None, VISION) == released
    for ratio in ("square", None):
        found = processor_of_llava({"image_aspect_ratio": ratio}, config, None, VISION)
        assert found == dataclasses.replace(released, aspect_ratio="crop")
    write(tmp_path, preprocessor_config=CLIP | {"image_mean": 0.5})
    assert processor_of_llava({"image_aspect_ratio": "pad"}, config, None, VISION).mean == (0.5,) * 3
    write(tower, preprocessor_config=CLIP | {"size": 32, "resample": 2})
    found = processor_of_llava({"image_aspect_ratio": "pad"}, config, tower, VISION)
    assert found == dataclasses.replace(released, resize_to=(32,), resample="bilinear")
    with pytest.raises(UserError, match="config.json: image_aspect_ratio: expected 'pad' .*, found 'anyres'"):
        processor_of_llava({"image_aspect_ratio": "anyres"}, config, tower, VISION)
    assert processor_of_tower([tower], VISION) == dataclasses.replace(found, transparency="white")

    # And back: the released code pads with the mean colour, then its tower's processor is transformers' CLIP
    written = processor_to_hf(found, tmp_path, "voco")
    assert written["image_processor_type"] == "CLIPImageProcessor" and "do_pad" not in written
    write(tower, preprocessor_config=written)
    assert processor_of_llava({"image_aspect_ratio": "pad"}, config, tower, VISION) == found


def test_siglips_pictures(tmp_path):
    """A run without a file of its own: stretched, or padded with grey by the LLaVA around it; and back."""
    vision = dataclasses.replace(VISION, class_token=False)
    config, tower = tmp_path / "config.json", tmp_path / "tower"
    theirs = transformers.SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    for ratio in "pad", "square":
        ours = processor_of_llava({"image_aspect_ratio": ratio}, config, None, vision)
        for i, size in enumerate([(1, 90), (77, 31), (30, 29), (2, 3)]):
            picture = noise(*size, seed=i)
            shown = pad_to_square(picture, (127,) * 3) if ratio == "pad" else picture
            expected = theirs(shown, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
            np.testing.assert_allclose(ours(picture), expected, rtol=1e-6, atol=1e-6, err_msg=str(size))
    written = processor_to_hf(ours, tmp_path, "llava-hf")
    assert written["image_processor_type"] == "SiglipImageProcessor" and "crop_size" not in written
    assert processor_to_hf(ours, tmp_path, "voco")["crop_size"] == {"height": SIZE, "width": SIZE}  # read as CLIP's
    assert processor_of_llava_hf(tmp_path, vision) == ImageProcessor(
        SIZE, "pad", (0.5,) * 3, (0.5,) * 3, transparency="white"
    )
    untyped = {key: value for key, value in SIGLIP.items() if key != "image_processor_type"}
    write(tower, preprocessor_config=untyped)  # an untyped file is that of the tower's family
    assert processor_of_tower([tower], vision, pad=False).aspect_ratio == "stretch"
    write(tower, preprocessor_config={"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 256})
    with pytest.raises(UserError, match="image_processor_type: expected .*, found 'Siglip2ImageProcessor'"):
        processor_of_tower([tower], vision)


def test_a_run_keeps_its_processor(tmp_path):
    """Through config.json, for every form."""
    for fields in PROCESSORS.values():
        source = Source("llava-hf", tmp_path, LlamaConfig(), VISION, processor=processor_from_hf(fields, "", SIZE))
        save_config(run_config(source, 400, Options(), tmp_path), tmp_path / "config.json")
        assert make_processor(load_config(tmp_path / "config.json")) == source.processor
    config = default_config()
    set_processor(config, ImageProcessor(config.model.vision.image_size, pad_color=(1, 2, 3)))
    with pytest.raises(
        UserError, match=r"config.json: data.processor.pad_color: transformers pads with .* \(1, 2, 3\)"
    ):
        processor_to_hf(make_processor(config), tmp_path, "llava-hf")


def test_training_goes_on_with_a_runs_pixels(tmp_path, small_tokenizer):
    """Those that no config has by default; whether pictures are padded is the config's to say, and noted."""
    run, config = tmp_path / "run", default_config()
    save_tokenizer(small_tokenizer, run / "tokenizer")
    given = default_config()
    set_processor(given, processor_from_hf(SIGLIP | {"image_mean": 0.4}, "", SIZE))
    save_config(given, run / "config.json")
    config.init_from = str(run)
    begun = begin_with_run(config)
    assert begun.data.processor.image_mean == (0.4,) * 3 and begun.data.aspect_ratio == "stretch"
    assert first_difference(begun.data, given.data) is None and not other_pixels(begun.init_from, begun.data)
    config.data.processor.image_mean = (0.3,) * 3
    with pytest.raises(UserError, match=r"config.data.processor.image_mean: .*run has \(0.4, .* found \(0.3, "):
        begin_with_run(config)

    config = default_config()
    config.init_from, given = str(run), default_config()
    given.data.aspect_ratio = "crop"
    save_config(given, run / "config.json")
    begun = begin_with_run(config)
    assert begun.data.aspect_ratio == "pad"
    assert other_pixels(begun.init_from, begun.data).endswith(
        "run has 'crop', this config 'pad': the weights were trained on other pixels"
    )


def test_memories_of_before_a_field_was_there_stay_readable():
    """Fingerprints as the code of that time made them, without LoRA and rotary scaling and with both."""
    model = VoCoConfig(llama=LlamaConfig(vocab_size=32001), vision=ViTConfig())
    processors = [ImageProcessor(336, "pad"), ImageProcessor(336, "crop"), ImageProcessor(336, transparency="white")]
    processors += [ImageProcessor(336, resample="box"), ImageProcessor(336, mean=(0.5,) * 3)]
    found = [fingerprint(model, {"a": 1}, processor) for processor in processors]
    assert found[:2] == ["4fdbeb33c1d3bf98bd355003377fee1a", "e7284ec68dee190ce4e8bbf737916080"]
    assert len(set(found)) == len(found)
    llama = dataclasses.replace(model.llama, rope_scaling=RopeScaling())
    model = dataclasses.replace(model, llama=llama, lora=LoRAConfig(4, 8.0, ("q_proj",)))
    assert fingerprint(model, {"a": 1}, processors[0]) == "187f9d856ce9cd445e3fef77c3830a74"
