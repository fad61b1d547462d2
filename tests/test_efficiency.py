"""The benchmarks of what a compressed picture saves: their counts by formula, their peer by its tokens."""

import dataclasses

import numpy as np
import pytest

from benchmarks import efficiency, growth
from benchmarks.efficiency import FULL, HIT, MISS, NO, QUESTIONS, TINY, Sides
from voco_jax.models.flops import compress_forward, head_forward, layers_forward, projector_forward, vision_forward
from voco_jax.models.llama import LlamaConfig
from voco_jax.models.vit import ViTConfig
from voco_jax.models.voco import VoCoConfig


def test_counts_are_those_of_the_formula():
    llama = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
                        num_key_value_heads=2)  # fmt: skip
    vision = ViTConfig(image_size=112, hidden_size=128, intermediate_size=256, num_hidden_layers=3,
                       num_attention_heads=2)  # fmt: skip
    found = efficiency.counts("voco_v1", llama, vision)
    assert found["text_tokens"] == 46 and found["places"] == {FULL: 64, HIT: 1}
    token = 2 * 3 * 2 * 64 * 2  # keys and values, layers, heads, head size, bytes
    assert found["bytes"] == {FULL: 64 * token, HIT: token}
    llama = dataclasses.replace(llama, vocab_size=32001)
    config = VoCoConfig(llama=llama, vision=vision, suffix_ids=(28705, 13))
    see = vision_forward(vision, 1) + projector_forward(config, 1)
    text = lambda tokens, places: layers_forward(llama, tokens, 2 * places) + head_forward(llama, 1)  # noqa: E731
    expected = {
        NO: see + text(112, 112),
        FULL: text(47, 112),
        HIT: text(46, 47),
        MISS: see + compress_forward(config, 1) + text(46, 47),
    }
    for way, flops in expected.items():  # rotary positions, norms and the like are counted by XLA alone
        assert 1 < 1e12 * found["tflops"][way] / flops < 1.12, way
    most = found["most_text_for_94_8_percent"]
    assert 8 <= most <= 64


@pytest.fixture(scope="module")
def sides():
    return Sides(TINY)


def test_transformers_says_the_same(sides):
    """Question by question and in its padded batch: the peer is the same model."""
    started = sides.ask(sides.plain, sides.features, QUESTIONS, 6)
    ours = sides.go_on(sides.plain, started, 6)
    np.testing.assert_array_equal(ours, sides.peer_answers(QUESTIONS, 6))
    np.testing.assert_array_equal(ours[:1], sides.peer_answers(QUESTIONS[:1], 6))
    first, cache = sides.peer_first(QUESTIONS[:1])
    np.testing.assert_array_equal(ours[:1], sides.peer_steps(first, cache, 5))
    assert len(np.unique(ours)) > 5


def test_a_full_cache_says_the_same(sides):
    ours = sides.go_on(sides.plain, sides.ask(sides.plain, sides.features, QUESTIONS[:1], 1), 1)
    assert sides.after_picture(sides.picture_cache())[0, 0] == ours[0, 0]


def test_growth(tmp_path):
    figures = growth.measure(1, tiny=True)
    voco, plain = (figures["models"][name] for name in (growth.VOCO, growth.PLAIN))
    assert [row["pictures"] for row in voco] == [1, 2, 3, 5, 7, 10]
    assert [row["pictures"] for row in plain] == [1, 2, 3, 5]  # 7 · 576 and the text are more than 4,096
    assert all(576 * a["kept_bytes"] == b["kept_bytes"] for a, b in zip(voco, plain, strict=False))
    assert figures["stops"][growth.PLAIN].startswith("at 6 pictures")
    growth.draw(figures, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000
