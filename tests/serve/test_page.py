"""The page in a real browser: `make page-test` installs what this needs."""

import contextlib
import os
from pathlib import Path
import re
import stat
import threading
import time

import httpx
from PIL import Image
import pytest

from tests.helpers.browser import chromium
from tests.serve.conftest import clip, running, until
from voco_jax.api import Model, Request
from voco_jax.checkpoint.run import load_run
from voco_jax.data.conversations import Encoder
from voco_jax.infer.engine import Engine
from voco_jax.serve.service import Defaults

pytestmark = pytest.mark.browser

KEYS = ("the key of the first one", "the key of the second")
QUESTION = "what shape is in the image?"
SHORT, LONG = Defaults(12), Defaults(3000, 2.0)


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with running(model, store=str(tmp_path_factory.mktemp("store")), rows=4, defaults=SHORT, page=True) as server:
        yield server


class Tab:
    """The page of a server. What it loads from elsewhere, and errors in its scripts, are faults."""

    def __init__(self, page, url: str):
        self.page, self.url, self.faults = page, url, []
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: self.faults.append(f"script: {error}"))
        page.on("dialog", lambda dialog: (self.faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: self._of(request.url))
        page.on("console", lambda said: self.faults.append(f"console: {said.text}") if said.type == "error" else None)

    def _of(self, url: str) -> None:
        if not url.startswith((f"{self.url}/", "data:", "blob:")):
            self.faults.append(f"request: {url}")

    def open(self) -> "Tab":
        self.page.goto(self.url)
        self.page.wait_for_selector("#question textarea")
        self.page.wait_for_function("() => document.querySelector('#album .cards, #album .hint, #question')")
        return self

    def drop(self, *files) -> None:
        self.page.set_input_files("#drop input[type=file]", files)

    def drop_well(self, *files) -> None:
        """Until the page is about them."""
        self.drop(*files)
        self.page.wait_for_function(
            "n => [...document.querySelectorAll('#chosen figcaption')].map(e => e.innerText).join() == n",
            arg=",".join(file.name for file in files),
        )

    def ask(self, question: str) -> None:
        self.page.fill("#question textarea", question)
        self.page.get_by_role("button", name="Ask", exact=True).click()

    def answer(self, question: str) -> str:
        """The answer, when there is all of it."""
        count = len(self.said)
        self.ask(question)
        self.page.wait_for_function(
            """n => document.querySelectorAll('#log .message.bot').length > n
            && document.querySelector('#told').innerText.startsWith('Answered in')""", arg=count,
        )  # fmt: skip
        return self.said[-1]

    @property
    def said(self) -> list[str]:
        """The answers in the conversation."""
        return [" ".join(text.split()) for text in self.page.locator("#log .message.bot").all_inner_texts()]

    @property
    def problem(self) -> str:
        return self.page.wait_for_selector(".problem").inner_text()

    def cards(self):
        return self.page.locator("#album [data-id]")


@contextlib.contextmanager
def tab(browser, server, **options):
    context = browser.new_context(viewport={"width": 1280, "height": 800}, **options)
    try:
        one = Tab(context.new_page(), server.url)
        yield one
        assert one.faults == []
    finally:
        context.close()


def counted(server, what: str) -> int:
    (count,) = re.findall(rf"^voco_{what}_total (\S+)", httpx.get(f"{server.url}/metrics").text, re.M)
    return int(float(count))


def words(text: str) -> str:
    return " ".join(text.split())


def test_a_picture_is_kept_and_asked_about(browser, server, model, pictures):
    """What it costs is shown; answers are those of `ask`, with all tokens and with one; another day it is still there,
    and nothing is compressed for it again."""
    with tab(browser, server) as one:
        one.open().drop_well(pictures[0])
        vision, llama = model.config.vision, model.config.llama
        whole = 2 * llama.num_hidden_layers * llama.num_key_value_heads * llama.head_dim * vision.num_features * 4
        costs = words(one.page.inner_text("#chosen table tbody"))
        bank = model.compress(str(pictures[0]))
        assert f"tokens in a prompt 2 {vision.num_features} " in costs
        assert f"bytes kept {bank.nbytes / 1024:.1f} KiB {whole / 1024:.1f} KiB {whole / bank.nbytes:.0f} ×" in costs
        expected = [model.ask(QUESTION, pictures[0], max_new_tokens=12, tokens=tokens) for tokens in (2, 1)]
        assert one.answer(QUESTION) == words(expected[0])
        one.page.fill("#tokens input[type=number]", "1")
        one.page.press("#tokens input[type=number]", "Tab")
        assert one.answer(QUESTION) == words(expected[1])
        assert "tokens instead of" in one.page.inner_text("#told")
        one.page.get_by_label("As few as a sure answer needs").check()
        assert one.answer(QUESTION) == words(model.ask(QUESTION, pictures[0], max_new_tokens=12, tokens="auto"))
        assert re.search(r"It read [12] of each image\.", one.page.inner_text("#told"))
    count = counted(server, "compressed_images")
    with tab(browser, server) as one:
        one.open().cards().filter(has_text=pictures[0].name).click()
        one.page.wait_for_selector("#chosen figure")
        assert one.answer(QUESTION) == words(expected[0])
        one.drop(pictures[0])
        one.page.wait_for_selector("#chosen :text('Stored already')")
    assert counted(server, "compressed_images") == count


def test_several_pictures_and_a_clip(browser, server, model, pictures, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(clip())
    with tab(browser, server) as one:
        one.open().drop_well(*pictures[1:3])
        assert one.answer("is it?") == words(model.ask("is it?", pictures[1:3], max_new_tokens=12))
        one.drop_well(tmp_path / "clip.mp4")
        frames = model.compress_video(str(tmp_path / "clip.mp4"))
        assert f"{len(frames)} images in all" in one.page.inner_text("#chosen") and one.said == []
        assert one.answer("is it?") == words(model.ask("is it?", frames, max_new_tokens=12))
        model.save(model.compress(list(map(str, pictures[:2]))), tmp_path / "two.voco")
        one.drop_well(tmp_path / "two.voco")
        assert one.answer("is it?") == words(model.ask("is it?", pictures[:2], max_new_tokens=12))
        one.cards().filter(has_text="clip.mp4").click()
        one.page.wait_for_selector("#chosen figcaption:text('clip.mp4')")
        one.page.get_by_role("button", name="Delete from the album").click()
        one.page.wait_for_selector("#chosen .hint:text('Drop a picture')")
        assert one.cards().filter(has_text="clip.mp4").count() == 0
        assert not [entry for entry in server.server.service.store.entries()[0] if entry.kind == "video"]


def test_earlier_questions(browser, server, model, pictures):
    """Are read with a question where the box is ticked, and shown either way."""
    with tab(browser, server) as one:
        one.open().drop_well(pictures[0])
        first = one.answer("is it?")
        box = one.page.get_by_label("Read earlier questions too")
        box.uncheck()
        assert one.answer(QUESTION) == words(model.ask(QUESTION, pictures[0], max_new_tokens=12))
        (prompt,) = model.prompts([Request(QUESTION, pictures[0])])
        assert f"The prompt had {len(prompt.sample)} tokens instead of" in one.page.inner_text("#told")
        chat = model.chat(pictures[0], max_new_tokens=12)
        assert words(chat.ask("is it?")) == first
        one.page.get_by_role("button", name="New conversation").click()
        one.page.wait_for_function("document.querySelectorAll('#log .message.bot').length == 0")
        box.check()
        assert [one.answer("is it?"), one.answer(QUESTION)] == [first, words(chat.ask(QUESTION))]
        assert f"The prompt had {len(prompt.sample)} tokens" not in one.page.inner_text("#told")


def test_stop(browser, model, pictures, monkeypatch):
    """Text comes while it is made; Stop, and closing the tab, give the row back."""
    monkeypatch.setattr(Encoder, "stop_ids", (10**6,))  # no answer ends by itself,
    monkeypatch.setattr(Engine, "_until_end", lambda self, ids: [*ids])  # nor does its text, where the end is drawn
    with running(model, rows=4, defaults=LONG, page=True) as server:
        free = lambda: server.scheduler.running == 0  # noqa: E731
        decode = server.scheduler.batch.decode
        monkeypatch.setattr(server.scheduler.batch, "decode", lambda **how: (time.sleep(0.1), decode(**how))[1])
        with tab(browser, server) as one:
            one.open().drop_well(pictures[0])
            one.ask(QUESTION)
            one.page.wait_for_function("document.querySelector('#log .message.bot')?.innerText.length > 40")
            begun = one.said[-1]
            longer = "n => document.querySelector('#log .message.bot').innerText.length > n + 40"
            one.page.wait_for_function(longer, arg=len(begun))
            assert server.scheduler.running == 1
            one.page.get_by_role("button", name="Stop").click()
            until(free, "Stop did not stop it")
            one.page.get_by_role("button", name="Ask", exact=True).wait_for()
            assert "Stopped." in one.page.inner_text("#told") and words(one.said[-1]).startswith(words(begun)[:40])
            one.ask(QUESTION)
            until(lambda: server.scheduler.running == 1, "it was not asked again")
        until(free, "nobody listens any more, and the row is not free")
        assert counted(server, "completion_tokens") < 3000


def test_while_it_is_compressed(browser, server, monkeypatch, tmp_path):
    """The page says so, and may be told to stop."""
    for color in ("blue", "green"):
        Image.new("RGB", (40, 30), color).save(tmp_path / f"{color}.png")
    encoder, go_on = server.server.service.model.image_encoder, threading.Event()
    encode = encoder.encode_pixels
    monkeypatch.setattr(encoder, "encode_pixels", lambda *args: (go_on.wait(60), encode(*args))[1])
    with tab(browser, server) as one:
        one.open().drop(tmp_path / "blue.png", tmp_path / "green.png")
        assert one.page.wait_for_selector(".working").inner_text() == "Compressing blue.png, 1 of 2 …"
        assert one.page.locator(".working [role=progressbar]").is_visible()
        one.page.get_by_role("button", name="Stop").click()
        one.page.wait_for_selector("#came :text('Stopped.')")
        assert one.page.locator("#chosen figure").count() == 0
        go_on.set()
        one.drop_well(tmp_path / "blue.png")


def test_problems_are_told_in_sentences(browser, server, model, pictures, tmp_path):
    """And what was there stays."""
    (tmp_path / "notes.pdf").write_bytes(b"%PDF-1.7 ...")
    (tmp_path / "half.png").write_bytes(pictures[1].read_bytes()[:200])
    with tab(browser, server) as one:
        one.open().drop_well(pictures[1])
        assert one.cards().count()
        expected = one.answer(QUESTION)
        one.drop(tmp_path / "notes.pdf")
        assert re.fullmatch(r"notes\.pdf cannot be used: expected a picture \(.*\), found PDF\.", one.problem)
        assert one.page.locator("#chosen figure").count() == 1 and one.said == [expected]
        one.drop(tmp_path / "half.png", pictures[2])
        one.page.wait_for_selector("#chosen figure:has-text('2.png')")
        assert one.problem.startswith("half.png cannot be used: ")
        one.ask(" ")
        one.page.wait_for_selector("#told :text('Write a question first.')")
        one.ask("word " * 9000)
        one.page.wait_for_selector("#told .problem")
        assert one.problem != "" and one.said == []
        told = one.page.inner_text("#told .problem")
        assert told == "The conversation is too long for this model. Begin a new one."
        assert one.page.input_value("#question textarea").startswith("word word")  # it may be shortened
        assert one.answer(QUESTION) == words(model.ask(QUESTION, pictures[2], max_new_tokens=12))
        store = server.server.service.store
        for entry in store.entries()[0]:
            store.delete(entry.id)
        one.ask(QUESTION)
        one.page.wait_for_selector("#told .problem")
        assert one.page.inner_text("#told .problem") == "This picture is not in the store any more. Drop it again."


@pytest.mark.parametrize("name", ["<img src=x onerror=alert(1)>.png", "${alert(1)} {{alert}} @children.png"])
def test_names_are_only_text(browser, server, pictures, tmp_path, name):
    """In the album, of what is chosen, and in questions and answers."""
    (file := tmp_path / name).write_bytes(pictures[3].read_bytes())
    files = {"file": (name, file.read_bytes(), "image/png")}
    httpx.post(f"{server.url}/v1/memories", files=files, data={"name": name}, timeout=60).raise_for_status()
    with tab(browser, server) as one:
        one.open().cards().filter(has_text=name).click()
        one.page.wait_for_selector("#chosen figure")
        assert one.page.inner_text("#chosen figcaption") == name
        one.answer(f"what is {name} <b>x</b>?")
        assert f"what is {name} <b>x</b>?" in one.page.inner_text("#log")
        one.drop(file)  # Gradio takes some characters out of its name
        one.page.wait_for_selector("#chosen :text('Stored already')")


def test_keys(browser, model, pictures, tmp_path_factory):
    """The page asks for one; with --isolate each has an album of its own; the cookie is no key."""
    store = str(tmp_path_factory.mktemp("store"))
    with running(model, store=store, keys=KEYS, isolate=True, defaults=SHORT, page=True) as server:
        with tab(browser, server) as one:
            one.page.goto(server.url)
            one.page.fill("#key", "something else")
            one.page.press("#key", "Enter")
            one.page.wait_for_selector("[role=alert]:text('This key is not known here.')")
            one.faults.clear()  # that the server has answered 401
            one.page.fill("#key", KEYS[0])
            one.page.press("#key", "Enter")
            one.page.wait_for_selector("#question textarea")
            one.drop_well(pictures[0])
            one.answer(QUESTION)
            (cookie,) = one.page.context.cookies()
            assert cookie["httpOnly"] and cookie["sameSite"] == "Lax" and KEYS[0] not in cookie["value"]
            assert KEYS[0] not in one.page.content()
            wrong = httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {cookie['value']}"})
            assert wrong.status_code == 401
            one.page.get_by_role("button", name="Log out").click()
            one.page.wait_for_selector("#key")
            one.faults.clear()
            one.page.fill("#key", KEYS[1])
            one.page.press("#key", "Enter")
            one.page.wait_for_selector("#album .hint:text('The album is empty')")
            one.drop_well(pictures[0])
            assert "Stored already" not in one.page.inner_text("#chosen")
        assert len(server.client(KEYS[0]).get("/memories", cast_to=object)["data"]) == 1


def test_a_model_without_memories(browser, tiny_run, pictures):
    """Has no album, and its pictures are asked about all the same."""
    model = Model(load_run(tiny_run, compressor="none"))
    with running(model, defaults=SHORT, page=True) as server, tab(browser, server) as one:
        one.open().drop_well(*pictures[:2])
        assert not one.page.locator("#album").is_visible() and not one.page.locator("#tokens").is_visible()
        expected = model.ask(QUESTION, pictures[:2], max_new_tokens=12)
        assert one.answer(QUESTION) == one.answer(QUESTION) == words(expected)


def test_values_name_no_urls(server, monkeypatch):
    """Gradio would fetch them, whichever component they are given to."""
    from gradio import processing_utils

    fetched = []
    monkeypatch.setattr(processing_utils, "async_ssrf_protected_download", lambda url, **_: fetched.append(url))
    page = httpx.get(f"{server.url}/config").json()
    for dependency in page["dependencies"]:
        url = "http://example.com/a.png"
        named = {"path": url, "url": url, "meta": {"_type": "gradio.FileData"}}
        for value in (named, [named]):
            body = {
                "data": [value] * len(dependency["inputs"]), "fn_index": dependency["id"], "session_hash": "abc",
            }  # fmt: skip
            assert httpx.post(f"{server.url}/gradio_api/queue/join", json=body).status_code == 200
    with httpx.stream("GET", f"{server.url}/gradio_api/queue/data?session_hash=abc", timeout=60) as events:
        told = "".join(line for line in events.iter_lines())
    assert "process_completed" in told and fetched == []


@pytest.mark.parametrize(
    "path",
    ["file=/etc/hostname", "file=http://example.com", "proxy=http://a.hf.space", "info", "runs", "run-history/buckets"],
)
def test_what_gradio_has_beside(server, path):
    response = httpx.get(f"{server.url}/gradio_api/{path}")
    assert response.status_code == 404 and "error" in response.json()


def test_uploads_do_not_stay(server, pictures):
    from voco_jax.serve import page

    (file,) = httpx.post(f"{server.url}/gradio_api/upload", files={"files": pictures[0].read_bytes()}).json()
    page.delete_files(time.time() - 60)
    assert Path(file).read_bytes() == pictures[0].read_bytes() and Path(file).is_relative_to(page._FILES)
    page.delete_files(time.time() + 60)
    assert os.listdir(page._FILES) == [] and stat.S_IMODE(os.stat(page._FILES).st_mode) == 0o700
