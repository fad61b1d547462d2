"""Batches: what is in them, and that they are the same for any workers, hosts and interruptions."""

from collections import Counter
import json
import multiprocessing
import os
from pathlib import Path
import signal
import time

import numpy as np
import pytest

from tests.helpers.record_lists import ListSource, data_config, greys, make_batches, plain_picture, turns
from voco_jax.chat_templates import CHAT_TEMPLATES
from voco_jax.data import pipeline, processes
from voco_jax.data.conversations import Encoder
from voco_jax.data.pipeline import default_threads
from voco_jax.data.records import Picture, Record
from voco_jax.errors import TryAgain, UserError

ANSWERS = ["red", "a cat", "it is a red cat"]


@pytest.fixture(scope="module")
def encoder(small_tokenizer):
    return Encoder(small_tokenizer, CHAT_TEMPLATES["bare"], num_voco_tokens=2, num_visual_tokens=2, compressed=True)


@pytest.fixture(scope="module")
def source():
    """40 records: one to three conversations about a picture of a grey level of its own, and five about none."""
    records = [
        Record(
            [plain_picture(5 + i)],
            conversations=[turns(f"what is {i}?", ANSWERS[(i + j) % 3]) for j in range(1 + i % 3)],
        )
        for i in range(35)
    ]
    text = [[{"from": "human", "value": f"who is {i}?"}, {"from": "gpt", "value": "a cat"}] for i in range(35, 40)]
    return ListSource([*records, *(Record(conversations=[conversation]) for conversation in text)])


def packed(**changes):
    """Packs of two rows of 80 tokens (some four conversations each) and five images."""
    keys = dict(batch_size=4, rows_per_pack=2, row_length=80, images_per_pack=5, conversations_per_record=0)
    return data_config(**keys | changes)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def questions(batch, tokenizer) -> list[str]:
    """The numbers that a batch's conversations ask for, in order."""
    found = []
    for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
        for segment in range(1, segments.max() + 1):
            text = tokenizer.decode(tokens[segments == segment])
            found.append(text.split(" is ")[1].split("?")[0].strip())
    return found


def test_a_batch(source, encoder, small_tokenizer, tmp_path):
    batch = next(make_batches([source], encoder, packed(), tmp_path))
    shapes = {name: (x.shape, str(x.dtype)) for name, x in batch.items()}
    rows = dict.fromkeys(("tokens", "positions", "segment_ids", "slot_index", "targets"), ((8, 80), "int32"))
    pixels = ((4, 5, 8, 8, 3), "uint8")
    assert shapes == rows | {"weights": ((8, 80), "float32"), "pixel_values": pixels}
    said = small_tokenizer.decode(batch["targets"][batch["weights"] > 0]).split("</s>")
    assert {answer.strip() for answer in said} <= {*ANSWERS, ""}
    # The slots of every conversation are those of its own picture
    grey = greys(batch)
    checked = 0
    for b in range(4):
        for row in (2 * b, 2 * b + 1):
            for segment in range(1, batch["segment_ids"][row].max() + 1):
                here = batch["segment_ids"][row] == segment
                slots = batch["slot_index"][row][here]
                asked = small_tokenizer.decode(batch["tokens"][row][here]).split(" is ")[1].split("?")[0]
                if int(asked) < 35:
                    first, second = slots[slots >= 0]
                    assert second == first + 1 and grey[b][first // 2] == 5 + int(asked)
                    checked += 1
                else:
                    assert (slots == -1).all()
    assert checked > 10


def test_one_compression_serves_all_conversations_about_a_picture(source, encoder, tmp_path):
    for batch in [next(make_batches([source], encoder, packed(), tmp_path))]:
        for pack_ in greys(batch):
            shown = [grey for grey in pack_ if grey]
            assert len(set(shown)) == len(shown)


def test_every_conversation_of_an_epoch_arrives_once(source, encoder, small_tokenizer, tmp_path):
    batches = make_batches([source], encoder, packed(batch_size=1), tmp_path)
    epoch = batches.loader.plan.packs(0)
    found = Counter(q for _ in epoch for q in questions(next(batches), small_tokenizer))
    assert found == Counter({str(i): 1 + i % 3 if i < 35 else 1 for i in range(40)})
    assert batches.report.seen == sum(found.values()) and not batches.report.skipped


@pytest.mark.parametrize("layout", ["pack", "group"])
def test_resumes_after_any_batch(source, encoder, layout, tmp_path):
    data = packed(layout=layout, rows_per_pack=3)
    batches = make_batches([source], encoder, data, tmp_path)
    states, given = [], []
    for _ in range(12):  # into the second epoch
        states.append(json.loads(json.dumps(batches.get_state())))
        given.append(next(batches))
    assert batches.loader.plan.locate(11 * 4)[0] >= 1
    again = make_batches([source], encoder, data, tmp_path)
    for state, expected in list(zip(states, given, strict=True))[::-2]:
        again.set_state(state)
        same(next(again), expected)
        assert len(json.dumps(state)) < 100
    again.close()


@pytest.mark.parametrize("num_threads", [1, 4])
def test_threads_change_nothing(source, encoder, num_threads, tmp_path):
    one = make_batches([source], encoder, packed(), tmp_path)
    many = make_batches([source], encoder, packed(num_threads=num_threads), tmp_path)
    for _ in range(5):
        same(next(one), next(many))


@pytest.mark.parametrize(
    "cores, workers, batch_bytes, expected",
    [(1, 0, 10**6, 1), (2, 0, 10**6, 1), (16, 0, 10**6, 15), (16, 4, 10**6, 3), (64, 0, 10**6, 16), (64, 0, 2**29, 4)],
)
def test_threads_are_as_many_as_cores_and_memory_allow(cores, workers, batch_bytes, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    assert default_threads(workers, batch_bytes) == expected
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS has none
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert default_threads(workers, batch_bytes) == expected


def test_workers_change_nothing(source, encoder, tmp_path):
    """Two processes, stopped and gone on with none of them; also the numbers of tokens that packs draw."""
    alone = make_batches([source], encoder, packed(), tmp_path, elastic_k=(1, 2))
    workers = make_batches([source], encoder, packed(num_workers=2), tmp_path, elastic_k=(1, 2))
    for _ in range(5):
        same(next(alone), next(workers))
    state = workers.get_state()
    workers.close()
    other = make_batches([source], encoder, packed(), tmp_path, elastic_k=(1, 2))
    other.set_state(state)
    same(next(alone), next(other))


def shared_memory() -> bool:
    """Whether this process has any of it mapped."""
    return "/dev/shm/psm_" in Path("/proc/self/maps").read_text()


@pytest.mark.slow
def test_no_shared_memory_stays(source, encoder, tmp_path):
    """Neither of what was taken, which is still held, nor of what was made ahead; at the end of the data and before."""
    for num_batches in 4, 1000:
        batches = make_batches([source], encoder, packed(num_workers=1), tmp_path, num_batches=num_batches)
        held = [batch for _, batch in zip(range(5), batches, strict=False)]
        assert len(held) == min(num_batches, 5)
        batches.close()
        deadline = time.monotonic() + 10  # Grain has a thread for it
        while shared_memory():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_little_shared_memory_and_a_worker_that_is_killed(source, encoder, tmp_path, monkeypatch, capfd):
    """Batches come through pipes then, and a line says so; a kill is one line, and the status to try again."""
    monkeypatch.setattr(pipeline, "free_shared_memory", lambda: 10_000)
    alone = make_batches([source], encoder, packed(), tmp_path)
    workers = make_batches([source], encoder, packed(num_workers=1), tmp_path)
    for _ in range(5):
        same(next(alone), next(workers))
        assert not shared_memory()
    said = capfd.readouterr().err
    assert "data: /dev/shm has 0 MiB free, of " in said and "config.data.num_workers, .prefetch" in said
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    expected = r"data: a loader process was ended by SIGKILL \(out of memory\?\); the same command goes on"
    with pytest.raises(TryAgain, match=expected):
        while True:
            next(workers)
    workers.close()
    assert TryAgain.status == 75


def test_a_worker_that_dies_while_it_writes(monkeypatch):
    """Nobody comes back from the pipe then; who waits is ended, once what was whole must have been read."""
    ends = []
    monkeypatch.setattr(processes.interrupts, "end", lambda *args: ends.append(args))
    monkeypatch.setattr(processes, "_TICK", 0.01)
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(1000,), daemon=True)
    process.start()
    waiting = [0.0]
    watch = processes.Watch(lambda: waiting[0])
    while process not in watch._seen:
        assert watch.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not ends
    waiting[0] = processes._PATIENCE + 1
    while not ends:
        assert watch.is_alive()
    watch.stop()
    assert ends[0] == (75, f"error: {processes.ended(-signal.SIGKILL)}")
    assert "ended by SIGBUS: /dev/shm is full" in str(processes.ended(-signal.SIGBUS))


def test_hosts_come_and_go(source, encoder, small_tokenizer, tmp_path):
    """One host, two, then four: each global batch is what one host would have had, and the epoch loses nothing."""
    data = packed()
    whole = make_batches([source], encoder, data, tmp_path)
    found, state = Counter(), whole.get_state()
    packs = len(whole.loader.plan.packs(0))
    for hosts in (1, 2, 4, 4):
        shares = [range(h * 4 // hosts, (h + 1) * 4 // hosts) for h in range(hosts)]
        parts = [make_batches([source], encoder, data, tmp_path, shard=share) for share in shares]
        for part in parts:
            part.set_state(state)
        loaded = [next(part) for part in parts]
        expected = next(whole)
        same({name: np.concatenate([x[name] for x in loaded]) for name in expected}, expected)
        states = [part.get_state() for part in parts]
        assert all(s == states[0] for s in states)
        state = states[0]
        found.update(questions(expected, small_tokenizer))
    assert packs <= 16
    first_epoch = Counter({str(i): 1 + i % 3 if i < 35 else 1 for i in range(40)})
    assert not first_epoch - found  # and what is more belongs to the next epoch
    later = sum(whole.loader.plan.amount(range(i, i + 1)).conversations for i in range(packs, 16))
    assert sum(found.values()) == sum(first_epoch.values()) + later


def test_the_state_of_other_data_is_refused(source, encoder, tmp_path):
    state = make_batches([source], encoder, packed(), tmp_path).get_state()
    fewer = make_batches([ListSource(source.records[1:])], encoder, packed(), tmp_path)
    with pytest.raises(UserError, match="data: expected the records that this run began with .* found others"):
        fewer.set_state(state)


def test_weight_by_conversation(source, encoder, tmp_path):
    by_token = next(make_batches([source], encoder, packed(), tmp_path))
    batch = next(make_batches([source], encoder, packed(loss_weighting="conversation"), tmp_path))
    assert set(np.unique(by_token["weights"])) == {0.0, 1.0}
    np.testing.assert_array_equal(batch["weights"] > 0, by_token["weights"] > 0)
    for weights, segments in zip(batch["weights"], batch["segment_ids"], strict=True):
        sums = [weights[segments == s].sum() for s in range(1, segments.max() + 1)]
        np.testing.assert_allclose(sums, 1, rtol=1e-6)


def test_rows_are_as_long_as_the_longest_conversation(source, encoder, tmp_path):
    data = data_config(batch_size=2, images_per_pack=1, rows_per_pack=2, row_length=0, conversations_per_record=2)
    batches = make_batches([source], encoder, data, tmp_path)
    batch = next(batches)
    longest = max(len(encoder.encode(r.conversations[0], len(r.images))) for r in source.records)
    assert longest - 4 <= batch["tokens"].shape[1] <= longest + 4 and batch["tokens"].shape[0] == 4


def test_what_cannot_be_loaded_leaves_its_place_empty(source, encoder, small_tokenizer, tmp_path):
    """A picture that is gone takes its conversations with it, and nothing else: the others are as they were."""
    gone = [Record([Picture(tmp_path / "gone.png")], conversations=source.records[4].conversations)]
    broken = ListSource([*source.records[:4], *gone, *source.records[5:]])
    data = packed(batch_size=1, max_skipped_fraction=0.05)
    batches = make_batches([broken], encoder, data, tmp_path)
    found = Counter(q for _ in batches.loader.plan.packs(0) for q in questions(next(batches), small_tokenizer))
    assert found == Counter({str(i): 1 + i % 3 if i < 35 else 1 for i in range(40) if i != 4})
    assert batches.report.skipped == {"missing file": 2} and batches.report.seen == sum(found.values()) + 2
    assert batches.report.examples["missing file"] == [f"list[4]: {tmp_path / 'gone.png'}: not found"]

    strict = make_batches([broken], encoder, packed(batch_size=1, max_skipped_fraction=0.01), tmp_path)
    with pytest.raises(UserError, match=r"data: 2 of the first \d+ records cannot be used.*missing file: list\[4\]"):
        for _ in strict.loader.plan.packs(0):
            next(strict)


def test_augmentation_is_off_unless_asked_for(source, encoder, tmp_path):
    plain = next(make_batches([source], encoder, packed(), tmp_path))
    jitter = packed(color_jitter=0.5)
    first, again = (next(make_batches([source], encoder, jitter, tmp_path)) for _ in range(2))
    same(first, again)  # random, yet the same after an interruption
    assert (first["pixel_values"] != plain["pixel_values"]).any()
    np.testing.assert_array_equal(first["tokens"], plain["tokens"])
