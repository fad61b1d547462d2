"""Chat completions through the official client: answers are those of `ask`, whatever runs beside them."""

from concurrent.futures import ThreadPoolExecutor
import dataclasses
import json

import httpx
import numpy as np
import openai
import pytest

from tests.serve.conftest import part, running, said, until
from voco_jax.api import Request
from voco_jax.infer.generate import Sampling

# An answer that goes on and on: at this temperature nearly all tokens are equally likely
LONG = {"messages": said("what?"), "max_tokens": 3000, "temperature": 2.0, "seed": 1}
JSON = {"Content-Type": "application/json"}
QUESTIONS = ["what shape is in the image?", "is there a red circle?", "what color is the shape?", "is it?"]


def ask(server, *content, **options) -> str:
    options = {"model": "tiny", "max_tokens": 12} | options
    answer = server.client().chat.completions.create(messages=said(*content), **options)
    return answer.choices[0].message.content


def test_an_answer_is_that_of_ask(server, model, pictures):
    """About one picture, several, and none; in parallel; and again, when all pictures are known."""
    cases = [(q, pictures[:n]) for q in QUESTIONS for n in (0, 1, 3)]
    expected = model.answers([Request(q, list(about) or None) for q, about in cases], max_new_tokens=12)
    assert len({*expected}) > 1
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            assert list(pool.map(lambda case: ask(server, case[0], *case[1]), cases)) == expected
    until(lambda: server.scheduler.running == 0, "a row was lost")


def test_what_comes_back(server, model, pictures):
    client = server.client()
    messages = said(QUESTIONS[0], pictures[3])
    answer = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=5, logprobs=True, top_logprobs=3, n=2
    )
    first, second = answer.choices
    assert first.message.content == second.message.content and [first.index, second.index] == [0, 1]
    assert answer.object == "chat.completion" and answer.model == "tiny"
    assert answer.system_fingerprint == model.fingerprint
    (prompt,) = model.prompts([Request(QUESTIONS[0], pictures[3])])
    tokens = answer.usage.completion_tokens
    assert answer.usage.prompt_tokens == len(prompt.sample) and answer.usage.total_tokens == len(prompt.sample) + tokens
    told = first.logprobs.content
    assert "".join(t.token for t in told).strip() == first.message.content
    assert b"".join(bytes(t.bytes) for t in told).decode().strip() == first.message.content
    for token in told:
        assert len(token.top_logprobs) == 3 and token.top_logprobs[0].logprob == pytest.approx(token.logprob)
    is_length = len(told) == 5
    assert first.finish_reason == ("length" if is_length else "stop")
    again = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=5)
    assert again.usage.prompt_tokens_details.cached_tokens == 2  # K
    score = model.scores([Request(QUESTIONS[0], pictures[3])], [first.message.content])[0]
    if not is_length:
        sure = sum(t.logprob for t in told)
        assert score.log_probability <= sure + 1e-4  # the end of the answer is not among the tokens


def test_a_stream_is_the_answer(server, model, pictures):
    client = server.client()
    expected = model.ask(QUESTIONS[0], pictures[:2], max_new_tokens=12)
    stream = client.chat.completions.create(
        model="tiny", messages=said(*pictures[:2], QUESTIONS[0]), max_tokens=12, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    *texts, last = chunks
    assert "".join(c.choices[0].delta.content or "" for c in texts) == expected
    assert texts[0].choices[0].delta.role == "assistant" and texts[-1].choices[0].finish_reason in ("stop", "length")
    assert last.choices == [] and last.usage.completion_tokens >= 1 and {c.id for c in chunks} == {last.id}
    with client.chat.completions.create(model="tiny", messages=said("is it?"), stream=True, n=2) as stream:
        assert {c.choices[0].index for c in stream} == {0, 1}


def test_drawn_answers_are_those_of_ask(server, model, pictures):
    """`seed` repeats them; each of `n` has a random stream of its own, as the requests of a batch have."""
    sampling = Sampling(1.5, 0, 0.9, seed=5)
    expected = model.answers([Request(QUESTIONS[0], pictures[0])] * 3, max_new_tokens=8, sampling=sampling)
    how = dict(model="tiny", max_tokens=8, temperature=1.5, top_p=0.9, seed=5, n=3)
    for _ in range(2):
        answer = server.client().chat.completions.create(messages=said(QUESTIONS[0], pictures[0]), **how)
        assert [c.message.content for c in answer.choices] == expected
    assert len({*expected}) > 1
    free = {ask(server, QUESTIONS[0], pictures[0], temperature=2.0, max_tokens=8) for _ in range(6)}
    assert len(free) > 1  # without a seed every request draws anew


def test_stop_texts(server, model, pictures):
    for seed in range(20):
        how = dict(max_new_tokens=30, sampling=Sampling(2.0, seed=seed))
        (whole,) = model.answers([Request(QUESTIONS[0], pictures[0])], **how)
        if len(words := whole.split()) > 4:
            break
    stop = words[3]
    (expected,) = model.answers([Request(QUESTIONS[0], pictures[0])], until=[stop], **how)
    given = dict(max_tokens=30, stop=[stop, "never said"], temperature=2.0, seed=seed)
    assert ask(server, QUESTIONS[0], pictures[0], **given) == expected
    stream = server.client().chat.completions.create(
        model="tiny", messages=said(QUESTIONS[0], pictures[0]), stream=True, **given
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"
    # Its tokens are those up to the one that ends the stop text, whatever is decoded beside it
    found = server.client().chat.completions.create(
        model="tiny", messages=said(QUESTIONS[0], pictures[0]), logprobs=True, **given
    )
    told = [token.token for token in found.choices[0].logprobs.content]
    assert stop in "".join(told) and stop not in "".join(told[:-1]) and found.usage.completion_tokens == len(told)


def test_a_conversation_is_that_of_training(server, model, pictures, monkeypatch):
    """Turns, a system text, pictures of later turns, and parts in any order: the tokens that training would make."""
    asked = []
    check = server.scheduler.batch.check
    monkeypatch.setattr(server.scheduler.batch, "check", lambda ask: (asked.append(ask), check(ask)))

    def tokens(messages):
        server.client().chat.completions.create(model="tiny", messages=messages, max_tokens=1)
        return asked[-1].sample

    def expected(turns, count):
        return model.engine.encoder.encode(turns, count)

    def same(messages, turns, count):
        found, wanted = tokens(messages), expected(turns, count)
        np.testing.assert_array_equal(found.tokens, wanted.tokens)
        np.testing.assert_array_equal(found.slot_index, wanted.slot_index)

    one, two = pictures[:2]
    question = model.engine.encoder.question
    first = {"from": "human", "value": question("what?", 1)}
    same(said("what?", one), [first], 1)
    same(said(one, "what?"), [first], 1)
    answer = [{"role": "assistant", "content": "a circle", "refusal": None}]
    later = [*said("what?", one), *answer, *said("and this?", two)]
    same(
        later, [first, {"from": "gpt", "value": ("a circle",)}, {"from": "human", "value": question("and this?", 1)}], 2
    )
    assert [key for key, _ in asked[-1].images] != [key for key, _ in asked[0].images]
    literal = "is <image> a word, </s> or <voco>?"
    same(said(literal), [{"from": "human", "value": (literal,)}], 0)
    same([*said("a"), *said("b", one)], [{"from": "human", "value": ("a", "\n", *question("b", 1))}], 1)
    if model.engine.encoder.template.with_system:
        same(
            [{"role": "system", "content": "Be brief."}, *said("what?", one)],
            [{"from": "system", "value": "Be brief."}, first], 1,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        (dict(messages=[]), 400, "messages: List should have at least 1 item"),
        (dict(messages="hello"), 400, "messages: Input should be a valid list; found 'hello'"),
        (dict(messages=[{"role": "tool", "content": "x"}]), 400, "messages.0.role: Input should be 'system', "),
        (dict(messages=[{"role": "assistant", "content": "x"}]), 400, "messages: expected a user message last"),
        (dict(messages=[*said("a"), {"role": "system", "content": "x"}]), 400, "messages[1]: expected the system mess"),
        (dict(messages=said({"type": "image_url"}, "a")), 400, "messages: expected image_url or uuid, found none"),
        (dict(messages=said({"type": "input_audio", "input_audio": {}})), 400, "messages.0.content."),
        (dict(messages=said({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}, "a")), 400, ""),
        (dict(messages=said({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "a")), 400, ""),
        (dict(messages=said({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, "a")), 400, ""),
        (dict(messages=said({"type": "image_url", "uuid": "nobody's"}, "a")), 404, "uuid: no memory has the name or i"),
        (dict(messages=said("a \ud800")), 400, "body: expected JSON in UTF-8"),
        (dict(messages=said(" ")), 400, "messages: turn 0 (human): expected text, found none"),
        (dict(messages=said("word " * 9000)), 400, "question: expected at most "),
        (dict(messages=said("word " * 10**6)), 400, "question: expected at most "),
        (dict(model="gpt-4"), 404, "model: expected 'tiny', found 'gpt-4'"),
        (dict(temperature=-1), 400, "temperature: Input should be greater than or equal to 0; found -1"),
        (dict(temperature="hot"), 400, "temperature: Input should be a valid number; found 'hot'"),
        (dict(top_p=0), 400, "top_p: Input should be greater than 0"),
        (dict(n=1000), 400, "n: Input should be less than or equal to 128"),
        (dict(max_tokens=0), 400, "max_tokens: Input should be greater than or equal to 1"),
        (dict(max_tokens=10**6), 400, "question: expected at most "),
        (dict(logit_bias={"5": 100}), 400, "logit_bias: not supported by this server; leave it out"),
        (dict(tools=[{"type": "function"}]), 400, "tools: not supported by this server; leave it out"),
        (dict(response_format={"type": "json_object"}), 400, "response_format: not supported by this server"),
        (dict(frequency_penalty=0.5), 400, "frequency_penalty: not supported"),
        (dict(beam_width=5), 400, "beam_width: Extra inputs are not permitted"),
        (dict(top_logprobs=3), 400, "top_logprobs: expected logprobs with it"),
        (dict(stop=[""]), 400, "stop: expected at most 16 texts of 1 to 1000 characters"),
        (dict(stream_options={"include_usage": True}), 400, "stream_options: expected stream with it"),
        (dict(tokens=3), 400, "tokens 3: there are 2 tokens per image"),
    ],
)
def test_what_cannot_be_answered(server, changes, status, message):
    """OpenAI's error objects, with a line that says what is wrong; the next request is answered."""
    body = json.dumps({"model": "tiny", "messages": said("a")} | changes)
    response = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=JSON, timeout=60)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["message"].startswith(message) and "\n" not in error["message"] and error["type"]
    assert httpx.post(f"{server.url}/v1/chat/completions", json={"messages": said("a"), "max_tokens": 1}).is_success


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"a":' * 5000, b"\xff", b'{"messages": NaN}', b"1" * 10000]
)
def test_what_is_not_json(server, body):
    response = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=JSON)
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


def test_errors_are_the_clients_exceptions(server):
    client = server.client()
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="tiny", messages=said("a"), temperature=7)
    with pytest.raises(openai.NotFoundError, match="expected 'tiny'"):
        client.models.retrieve("another")
    assert [m.id for m in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    assert httpx.get(f"{server.url}/nothing").json()["error"]["message"] == "Not Found"


def test_fewer_tokens_and_auto(server, model, pictures):
    """`tokens` reads the first of each memory; "auto" as many as the answer needs, and says how many."""
    for tokens in (1, 2):
        expected = model.ask(QUESTIONS[1], pictures[:2], tokens=tokens, max_new_tokens=12)
        assert ask(server, QUESTIONS[1], *pictures[:2], extra_body={"tokens": tokens}) == expected
    (tried,) = model.auto_answers([Request(QUESTIONS[1], pictures[0])], max_new_tokens=12)
    answer = server.client().chat.completions.create(
        model="tiny", messages=said(QUESTIONS[1], pictures[0]), max_tokens=12, extra_body={"tokens": "auto"}
    )
    (choice,) = answer.choices
    assert choice.message.content == tried.text and choice.tokens == tried.tokens


def test_who_goes_away_frees_a_row(model):
    """From a stream, and from an answer as a whole."""
    with running(model, rows=1) as server:
        url = f"{server.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=LONG | {"stream": True}, timeout=60) as stream:
            next(stream.iter_lines())
            assert server.scheduler.running == 1
        until(lambda: server.scheduler.running == 0, "a client that has gone keeps its row")
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=LONG, timeout=0.3)
        until(lambda: server.scheduler.running == 0, "a client that has gone keeps its row")
        assert ask(server, "what?", max_tokens=2)


def test_too_many_wait(model):
    """429 with Retry-After for those that find the queue full; those that wait are answered."""
    with running(model, rows=1, max_waiting=3) as server:
        long = LONG | {"max_tokens": 200}
        with ThreadPoolExecutor(16) as pool:
            post = lambda _: httpx.post(f"{server.url}/v1/chat/completions", json=long, timeout=60)  # noqa: E731
            responses = list(pool.map(post, range(16)))
    statuses = [r.status_code for r in responses]
    assert {*statuses} == {200, 429} and statuses.count(200) >= 3
    sent_away = next(r for r in responses if r.status_code == 429)
    assert int(sent_away.headers["retry-after"]) >= 1 and sent_away.json()["error"]["code"] == "server_busy"
    assert len({r.json()["choices"][0]["message"]["content"] for r in responses if r.is_success}) == 1


def test_an_answer_that_takes_too_long(model):
    from voco_jax.serve.service import Defaults

    with running(model, defaults=dataclasses.replace(Defaults(), seconds=0.001)) as server:
        response = httpx.post(f"{server.url}/v1/chat/completions", json=LONG)
        assert response.status_code == 504 and response.json()["error"]["code"] == "timeout"


@pytest.mark.parametrize("step", ["admit", "read_on", "decode"])
def test_a_failure_of_the_devices_fails_its_requests_alone(model, monkeypatch, step):
    with running(model) as server:
        assert ask(server, "what?")
        batch = server.scheduler.batch
        monkeypatch.setattr(batch, step, lambda *_, **__: 1 / 0)
        response = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": said("what?")}, timeout=60)
        assert response.status_code == 500 and "could not compute" in response.json()["error"]["message"]
        assert ask(server, "what?") and server.scheduler.batch is not batch


def test_stopping_lets_answers_end(model):
    """Those that run are answered; /ready says no; new ones find nobody."""
    with running(model, grace=30) as server, ThreadPoolExecutor(1) as pool:
        body = LONG | {"max_tokens": 60}
        future = pool.submit(httpx.post, f"{server.url}/v1/chat/completions", json=body, timeout=60)
        until(lambda: server.scheduler.running == 1 or future.done(), "it is not running")
        server._uvicorn.should_exit = True
        assert future.result().is_success
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


def test_api_keys(model, pictures):
    """Without one nothing is told; with --isolate each key has memories of its own."""
    keys = ("a key of sixteen letters", "another key of such a length")
    with running(model, keys=keys, isolate=True) as server:
        for key in ("none", keys[0][:-1], "ключ"):
            response = httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}".encode()})
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            server.client("none").models.list()
        first, second = map(server.client, keys)
        named = said("what?", part(pictures[0], uuid="my cat"))
        expected = first.chat.completions.create(model="tiny", messages=named).choices[0].message.content
        by_name = said("what?", {"type": "image_url", "uuid": "my cat"})
        assert first.chat.completions.create(model="tiny", messages=by_name).choices[0].message.content == expected
        with pytest.raises(openai.NotFoundError, match="my cat"):
            second.chat.completions.create(model="tiny", messages=by_name)
        answer = second.chat.completions.create(model="tiny", messages=named)  # compressed anew, for nobody is told
        assert answer.usage.prompt_tokens_details.cached_tokens == 0
        assert httpx.get(f"{server.url}/health").is_success and httpx.get(f"{server.url}/ready").is_success
