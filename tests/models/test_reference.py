"""Exact to the released PyTorch code: its checkpoint in, its numbers out."""

import json

from flax import nnx
import jax
import numpy as np
import pytest

from tests.helpers import reference
from tests.helpers.losses import label_loss
from voco_jax.chat_templates import CHAT_TEMPLATES
from voco_jax.data.conversations import Encoder, Sample
from voco_jax.data.images import ImageProcessor, load_image
from voco_jax.data.packing import pack_row
from voco_jax.infer.generate import greedy
from voco_jax.models.voco import Read, VoCoLlama

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def golden():
    return reference.golden()


@pytest.fixture(scope="module")
def model():
    return reference.load_model()


@pytest.fixture(scope="module")
def features(model):
    return np.asarray(jax.jit(model.encode_images)(reference.pixel_values()))


# As one program: operation by operation, each test would compile a hundred
forward = nnx.jit(VoCoLlama.forward)


def read_stream(row: np.ndarray, label_from: int | None = None) -> Sample:
    """A golden row (BOS, image, newline, VoCo ×2, newline, text) from its first VoCo token on."""
    tokens = row[3:].astype(np.int32)
    slot_index = np.full(len(tokens), -1, np.int32)
    slot_index[:2] = 0, 1
    labels = np.arange(3, len(row)) >= (label_from if label_from is not None else len(row))
    return Sample(tokens, labels, slot_index, num_images=1)


def as_read(rows) -> Read:
    return Read(*(np.stack([getattr(row, name) for row in rows]) for name in Read._fields))


def test_projected_features(golden, features):
    np.testing.assert_allclose(features[:, 0], golden["features"], atol=TOLERANCE)


def test_logits_of_each_row_alone(model, golden, features):
    """The golden logits begin at the newline after the image: three are the compress stream's, the rest are read."""
    compressed = np.asarray(nnx.jit(VoCoLlama.compress_logits)(model, features))
    for i in range(2):
        sample = read_stream(golden[f"rows{i}"])
        logits = np.asarray(forward(model, as_read([pack_row([sample], len(sample))]), features[i : i + 1]))
        ours = np.concatenate([compressed[i, 0, -3:], logits[0, 2:]])
        np.testing.assert_allclose(ours, golden[f"logits{i}"], atol=TOLERANCE)


def test_logits_in_a_padded_batch(model, golden, features):
    samples = [read_stream(golden[f"rows{i}"]) for i in range(2)]
    logits = np.asarray(forward(model, as_read([pack_row([sample], 20) for sample in samples]), features))
    for i, sample in enumerate(samples):
        np.testing.assert_allclose(logits[i, 2 : len(sample)], golden[f"logits{i}"][3:], atol=TOLERANCE)


def test_logits_packed_in_one_row(model, golden, features):
    samples = [read_stream(golden[f"rows{i}"]) for i in range(2)]
    row = pack_row(samples, 30, first_slot=[0, 2])
    logits = np.asarray(forward(model, as_read([row]), features.reshape(1, 2, *features.shape[2:])))
    for i in range(2):
        ours = logits[0][row.segment_ids == i + 1][2:]
        np.testing.assert_allclose(ours, golden[f"logits{i}"][3:], atol=TOLERANCE)


def test_positions_of_the_released_code_or_from_zero_make_no_difference(model, golden, features):
    sample = read_stream(golden["rows0"])
    read = as_read([pack_row([sample], len(sample))])
    shifted = read._replace(positions=read.positions + 11)  # BOS, 9 patches, newline stand before the first VoCo token
    found, expected = (forward(model, positioned, features[:1]) for positioned in (shifted, read))
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


@pytest.mark.parametrize("packed", [False, True])
def test_loss(model, golden, packed):
    """The trainer's own loss, from pixels."""
    label_from, pixel_values = int(golden["label_from"]), reference.pixel_values()
    samples = [read_stream(golden[f"rows{i}"], label_from) for i in range(2)]
    if packed:
        rows = [pack_row(samples, 30, first_slot=[0, 2])]
        pixel_values = pixel_values.reshape(1, 2, *pixel_values.shape[2:])
    else:
        rows = [pack_row([sample], 20) for sample in samples]
    batch = {name: np.stack([getattr(row, name) for row in rows]) for name in rows[0].arrays()}
    assert batch["weights"].sum() == sum(len(golden[f"rows{i}"]) - label_from for i in range(2))
    loss = jax.jit(label_loss, static_argnums=0)(*nnx.split(model), batch | {"pixel_values": pixel_values})
    assert abs(loss - golden["loss"]) < TOLERANCE


def test_greedy_tokens_with_a_cache(model, golden, features):
    """Both prompts, of different lengths, in one batch; the released code recomputed everything at every token."""
    samples = [read_stream(golden[f"rows{i}"]) for i in range(2)]
    read = as_read([pack_row([sample], 16) for sample in samples])
    read = read._replace(positions=np.broadcast_to(np.arange(16), (2, 16)))
    lengths = np.array([len(sample) for sample in samples])

    @jax.jit
    def answered(features):
        memory = model.compress(features)
        assert memory.keys.shape == (2, 2, 2, 4, 8)  # layers, rows, VoCo tokens, heads, head size
        return greedy(model, read, lengths, memory, golden["gen"].shape[1], eos_token_id=-1)

    tokens = answered(features)
    np.testing.assert_array_equal(tokens, golden["gen"])


@pytest.mark.parametrize("index", range(4))
def test_ids_and_labels_of_conversations(llama_tokenizer, index):
    expected = json.loads((reference.DIRECTORY / "conversations.json").read_text())[index]
    encoder = Encoder(
        llama_tokenizer, CHAT_TEMPLATES["voco_v1"], num_voco_tokens=2, num_visual_tokens=2, compressed=True
    )
    sample = encoder.encode(expected["conversations"], int(expected["has_image"]))
    before = [*encoder.ids.prefix_ids, -200, *encoder.ids.suffix_ids] if expected["has_image"] else []
    assert before + sample.tokens.tolist() == expected["input_ids"]
    assert [-100] * len(before) + np.where(sample.labels, sample.tokens, -100).tolist() == expected["labels"]


@pytest.mark.parametrize("name", ["chelsea", "coffee_tall"])
def test_pixels(name):
    processor = ImageProcessor(336)
    pixels = processor(load_image(reference.DIRECTORY / f"{name}.png"))
    expected = np.load(reference.DIRECTORY / "pixels.npz")[name].transpose(1, 2, 0)
    one_grey_level = 1 / 255 / np.array(processor.std)
    assert (np.abs(pixels - expected) <= one_grey_level).all()
