"""The scheduler by itself: what it does in turn, and what happens to those who wait."""

from concurrent.futures import wait
import threading

import numpy as np
import pytest

from tests.serve.conftest import until
from voco_jax.api import Request
from voco_jax.infer.continuous import Ask, ContinuousBatch
from voco_jax.serve.scheduler import TOGETHER, Busy, Closed, Scheduler


@pytest.fixture
def scheduler(model):
    scheduler = Scheduler(model.image_encoder, ContinuousBatch(model.engine, most_rows=1), most_waiting=2)
    scheduler.start()
    yield scheduler
    scheduler.close(5)


def ask_of(model, new: int = 4) -> Ask:
    (prompt,) = model.prompts([Request("what is it?")])
    return Ask(prompt.sample, (), 2, new)


def squares(model, count: int) -> list[np.ndarray]:
    side = model.run.processor.size
    return list(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8))


def answered(scheduler, ask: Ask) -> str:
    """The text, when it is whole."""
    texts, done = [], threading.Event()

    def tell(i, update):
        texts.append(update.text)
        if update.finish:
            done.set()

    scheduler.submit([ask], tell)
    assert done.wait(60)
    return "".join(texts)


def test_an_upload_does_not_hold_up_answers(scheduler, model, monkeypatch):
    """Questions, and their pictures, are done between the batches of a large upload, which is whole in the end."""
    answered(scheduler, ask_of(model))  # compiled
    many, one = squares(model, 3 * TOGETHER[-1] + 2), squares(model, 1)
    batches = []
    encode = model.image_encoder.encode_pixels
    gate = threading.Semaphore(0)

    def counted(given, *args):
        batches.append(len(given))
        gate.acquire()
        return encode(given, *args)

    monkeypatch.setattr(model.image_encoder, "encode_pixels", counted)
    upload = scheduler.compress(many, is_upload=True)
    until(lambda: batches, "nothing is compressed")  # the first batch is under way
    picture = scheduler.compress(one)
    gate.release(2)
    picture.result(60)
    assert batches[:2] == [TOGETHER[-1], 1] and not upload.done()
    gate.release(1)
    assert answered(scheduler, ask_of(model)) == model.ask("what is it?", max_new_tokens=4)
    assert not upload.done()
    gate.release(9)
    found = upload.result(60)
    np.testing.assert_array_equal(found.keys, encode(many, [found.items[0]] * len(many)).keys)


def test_more_than_may_wait_are_sent_away(scheduler, model, monkeypatch):
    """Those that wait are answered all the same."""
    gate = threading.Event()
    admit = scheduler.batch.admit
    monkeypatch.setattr(scheduler.batch, "admit", lambda asks: (gate.wait(60), admit(asks))[1])
    updates = []
    for _ in range(2):
        scheduler.submit([ask_of(model)], lambda i, update: updates.append(update))
    with pytest.raises(Busy) as busy:
        scheduler.submit([ask_of(model)], lambda i, update: None)
    assert busy.value.retry_after >= 1
    gate.set()
    until(lambda: sum(bool(u.finish) for u in updates) == 2, "they are not answered")
    assert answered(scheduler, ask_of(model))


def test_who_is_told_when_it_stops(scheduler, model):
    """Answers that run go on for the time that is given; those that wait are told."""
    updates = []
    tickets = scheduler.submit([ask_of(model, 200)] * 2, lambda i, update: updates.append((i, update)))
    upload = scheduler.compress(squares(model, 200), is_upload=True)
    scheduler.close(0.0)
    finished = {i: update for i, update in updates if update.finish}
    assert {*finished} == {0, 1} and all(t.done for t in tickets) and not scheduler.is_alive
    assert wait([upload], 10).done
    with pytest.raises(Closed):
        scheduler.submit([ask_of(model)], lambda i, update: None)
    with pytest.raises(Closed):
        scheduler.compress(squares(model, 1))


def test_a_callback_that_fails_harms_nobody(scheduler, model):
    scheduler.submit([ask_of(model)], lambda i, update: 1 / 0)
    assert answered(scheduler, ask_of(model)) == model.ask("what is it?", max_new_tokens=4)
