"""`--tokens auto`: few tokens of a memory first, more where the answer is not sure."""

import dataclasses
import re

from flax import nnx
import numpy as np
import pytest

from tests.eval.test_answering import with_random_parameters
from tests.helpers.commands import run_main
import voco_jax
from voco_jax import ask
from voco_jax.api import Model, Request
from voco_jax.checkpoint.run import load_run
from voco_jax.data.conversations import Sample
from voco_jax.data.from_config import make_encoder, make_model_config
from voco_jax.data.sources import easyvqa
from voco_jax.errors import UserError
from voco_jax.infer.auto_tokens import AutoTokens, Try, answer_auto
from voco_jax.infer.engine import GREEDY
from voco_jax.infer.prompts import Prompt, answer, gather
from voco_jax.models.build import abstract_model

PICTURES = [record.images[0].file for record in easyvqa.load("test")[:3]]
QUESTIONS = ["what shape is in the image?", "is there a red circle?", "what color is the shape?"]


@pytest.fixture(scope="module")
def model(tiny_run) -> Model:
    """Four tokens a picture, the first of which say otherwise than all do."""
    run = with_random_parameters(load_run(tiny_run))
    run.config.model.num_voco_tokens = 4
    tokenizer = run.encoder.tokenizer
    model_config = make_model_config(run.config, tokenizer)
    graphdef, _ = abstract_model(model_config)
    encoder = make_encoder(run.config, tokenizer, model_config)
    return Model(dataclasses.replace(run, model=nnx.merge(graphdef, nnx.state(run.model)), encoder=encoder))


@pytest.fixture(scope="module")
def album(model):
    return model.compress(PICTURES)


@pytest.fixture(scope="module")
def requests(album) -> list[Request]:
    """About single pictures, two together, and none."""
    about = [album[0], album[1], album[:2], None]
    return [Request(question, images) for question in QUESTIONS for images in about]


@pytest.fixture(scope="module")
def tries(model, requests) -> list[list[Try]]:
    every = AutoTokens(every=True)
    return answer_auto(model.engine, model.prompts(requests), every, max_new_tokens=5)


def test_every_try_is_the_answer_with_so_many_tokens(model, requests, tries):
    assert [[one.tokens for one in of] for of in tries] == [[0] if r.images is None else [1, 2, 4] for r in requests]
    for place, tokens in enumerate((1, 2, 4)):
        given = model.answers(requests, tokens=tokens, max_new_tokens=5)
        assert given == [of[min(place, len(of) - 1)].text for of in tries]
    assert sum(of[0].text != of[-1].text for of in tries) > 2, "few tokens say what all do: this would say nothing"


def test_confidence_is_the_least_probability_of_a_token(model, album, requests):
    """Each token's by a pass over prompt and answer, of which it alone is a label."""
    engine = model.engine
    for request in requests[2:3]:
        prompt = model.prompts([request])[0]
        visual, indices = gather([prompt.images])
        state = engine.decode(engine.prefill([prompt.sample], visual, indices, 5, GREEDY, [0]), 5)
        ids = np.asarray(state.output)[0, : int(state.num_tokens)]
        n, sample = len(prompt.sample), prompt.sample + text_of(ids)
        expected = []
        for i in range(len(ids)):
            labels = np.arange(len(sample)) == n + i
            (score,) = engine.score([dataclasses.replace(sample, labels=labels)], visual, indices)
            expected.append(score.log_probability)
        (given,) = answer(engine, [prompt], max_new_tokens=5)
        np.testing.assert_allclose(given.log_probabilities, expected, rtol=1e-4, atol=1e-4)
        (found,) = model.auto_answers([request], AutoTokens(1.0), max_new_tokens=5)
        assert found.confidence == pytest.approx(np.exp(min(expected)), rel=1e-4) and found.tokens == 4


def text_of(ids) -> Sample:
    return Sample(np.array(ids, np.int32), np.zeros(len(ids), bool), np.full(len(ids), -1, np.int32), 0)


def test_more_tokens_only_where_the_answer_is_not_sure(model, requests, tries):
    asked = np.median([one.confidence for of in tries for one in of])
    found = model.auto_answers(requests, AutoTokens(asked), max_new_tokens=5)
    for of, one in zip(tries, found, strict=True):
        place = next((i for i, tried in enumerate(of) if tried.confidence >= asked), len(of) - 1)
        assert one[:2] == of[place][:2] and one.confidence == pytest.approx(of[place].confidence, rel=1e-4)
    assert {one.tokens for one in found} == {0, 1, 2, 4}
    assert model.answers(requests, tokens=AutoTokens(asked), max_new_tokens=5) == [one.text for one in found]
    few = model.auto_answers(requests, AutoTokens(0.0), max_new_tokens=5)
    assert {one.tokens for one in few} == {0, 1}
    assert model.answers(requests, tokens=AutoTokens(1.0), max_new_tokens=5) == model.answers(
        requests, max_new_tokens=5
    )


def test_nothing_is_compressed_again(model, monkeypatch):
    """Of pictures that are given with the question; all tokens are read in the end."""
    batches = []
    monkeypatch.setattr(
        model.engine, "_encode_images", lambda *a, encode=model.engine._encode_images: batches.append(a) or encode(*a)
    )
    found = model.auto_answers([Request(q, PICTURES[:2]) for q in QUESTIONS], AutoTokens(1.0), max_new_tokens=5)
    assert [one.tokens for one in found] == [4, 4, 4]
    assert len(batches) == 3  # one for each request's list, none for a try
    about = PICTURES[:2]
    model.auto_answers([Request(q, about) for q in QUESTIONS], AutoTokens(1.0), max_new_tokens=5)
    assert len(batches) == 4


def test_the_numbers_that_are_tried(model, album, tries):
    """Those that the run was trained with, of as many as a memory has."""
    assert AutoTokens().steps(4) == (1, 2, 4) and AutoTokens().steps(5) == (1, 2, 4, 5)
    assert AutoTokens().steps(1) == (1,) and AutoTokens(ladder=(3, 8)).steps(2) == (2,)
    trained = Model(dataclasses.replace(model.run, config=model.run.config.copy_and_resolve_references()))
    with trained.run.config.unlocked():
        trained.run.config.train.elastic_k = (4, 1, 4)
    assert trained.auto_tokens().ladder == (1, 4)
    question = [Request(QUESTIONS[0], album[0].first_tokens(2)), Request(QUESTIONS[0], album[0])]
    found = trained.auto_answers(question, AutoTokens(1.0), max_new_tokens=5)
    assert [one.tokens for one in found] == [1, 4]
    # Memories with fewer tokens, beside others
    found = model.auto_answers(question, AutoTokens(1.0), max_new_tokens=5)
    assert [one.tokens for one in found] == [2, 4]
    assert found[0].text == tries[0][1].text


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("few", "tokens: expected a number or 'auto', found 'few'"),
        (AutoTokens(ladder=(2, 8)), r"tokens auto: expected numbers of 1 … 4 tokens, found \[2, 8\]"),
    ],
)
def test_what_is_no_rule(model, tokens, message):
    with pytest.raises(UserError, match=message):
        model.ask(QUESTIONS[0], PICTURES[0], tokens=tokens)
    with pytest.raises(UserError, match=message):
        model.chat(PICTURES[0], tokens=tokens)


def test_models_without_a_choice(tiny_run, two_tokens_run):
    with pytest.raises(UserError, match="confidence: expected 0 … 1, found 7"):
        AutoTokens(7)
    with pytest.raises(UserError, match="tokens auto: .* has 1 token per image: there is nothing to choose"):
        voco_jax.load(tiny_run).ask(QUESTIONS[0], PICTURES[0], tokens="auto")
    with pytest.raises(UserError, match="a model with compressor 'none' has no memories"):
        Model(load_run(two_tokens_run, compressor="none")).watch(tokens="auto")


# ---- Conversations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("confidence", "tokens"), [(0.0, 1), (1.0, 4)])
def test_a_conversation_is_that_of_so_many_tokens(model, album, confidence, tokens):
    chat = model.chat(album[:2], tokens=AutoTokens(confidence), max_new_tokens=6)
    plain = model.chat(album[:2], tokens=tokens, max_new_tokens=6)
    for question in QUESTIONS:
        assert chat.ask(question) == plain.ask(question)
    assert chat.turns == plain.turns


def test_a_conversation_goes_on_with_more_tokens(model, album):
    """What was said stays; the turn that is not sure is read anew with all of it, and so are those after it."""
    chat = model.chat(album[:2], tokens=AutoTokens(0.0), max_new_tokens=6)
    first = chat.ask(QUESTIONS[0])
    prompt = model.prompts([Request(QUESTIONS[0], album[:2])])[0]
    visual, indices = gather([album[:2].first_tokens(1)])
    engine = model.engine.for_tokens(1)
    sample = prompt.sample.first_tokens(4, 1)
    ids = np.asarray(engine.decode(engine.prefill([sample], visual, indices, 6, GREEDY, [0]), 6).output)[0]
    said = [int(i) for i in ids[: list(ids).index(engine.encoder.ids.eos_token_id)]] if (
        engine.encoder.ids.eos_token_id in ids
    ) else ids.tolist()  # fmt: skip
    assert engine.text(said) == first
    chat._auto = AutoTokens(1.0)
    # The last token of the answer, and the stop token, stand at the front of the later turn's
    later = chat._later_turn(QUESTIONS[1])
    kept = said[: int(chat._filled) - len(sample)]
    whole = prompt.sample + text_of([*kept, *later.tokens])
    (expected,) = answer(model.engine, [Prompt(whole, album[:2])], max_new_tokens=6)
    assert chat.ask(QUESTIONS[1]) == expected.text
    whole = whole + text_of([])
    assert chat._tokens == 4 and chat.turns[1]["value"] == first
    assert len(chat._read) == chat._filled


# ---- The command -----------------------------------------------------------------------------------------------------


def test_the_command(two_tokens_run, monkeypatch, capsys):
    arguments = ["--run", two_tokens_run, "--image", PICTURES[0], "--max-new-tokens", 6, *QUESTIONS[:2]]
    said = {}
    for options in (["--tokens", "1"], ["--tokens", "2"], ["--tokens", "auto", "--confidence", "1"]):
        status, out, err = run_main(ask, monkeypatch, capsys, *options, *arguments)
        assert status == 0, err
        said[options[1]] = out.splitlines()[1::2]
    found = [re.fullmatch(r"(  .*)  \(2 tokens, [01]\.\d\d\)", line)[1] for line in said["auto"]]
    assert found == said["2"]
    assert err.count(f"note: {two_tokens_run} was trained with all 2 tokens alone (train.elastic_k)") == 1
    status, out, _ = run_main(ask, monkeypatch, capsys, "--tokens", "auto", "--confidence", "0", *arguments)
    assert [re.fullmatch(r"(  .*)  \(1 token, [01]\.\d\d\)", line)[1] for line in out.splitlines()[1::2]] == said["1"]
    for options, message in (
        (["--tokens", "1", "--confidence", ".5"], "--confidence: expected --tokens auto with it"),
        (["--tokens", "auto", "--confidence", "2"], "--confidence: expected 0 … 1, found 2.0"),
        (["--tokens", "some"], "--tokens: expected a number or 'auto', found 'some'"),
    ):
        status, _, err = run_main(ask, monkeypatch, capsys, *options, *arguments)
        assert status == 2 and message in err
