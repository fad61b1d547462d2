"""A tokenizer's chat template (Jinja, as in transformers) as one of ours.

transformers renders the template for a few conversations, in its sandbox and in a process of its own. The text around
the conversations' words becomes our template. It must render other conversations alike; a template that computes
something else is refused, and so is one whose conversation does not begin as its first turns do: answers would be
trained after another text than the one they are asked with. Nothing is thought aloud (`enable_thinking` is False).
"""

from collections.abc import Sequence
import dataclasses
import functools
import json
import os.path
from pathlib import Path
import signal
import subprocess
import sys
from typing import NamedTuple

from voco_jax.chat_templates import CHAT_TEMPLATES, EOS, SYSTEM, ChatTemplate
from voco_jax.data.control_tokens import ControlTokens
from voco_jax.data.conversations import Encoder
from voco_jax.data.turns import IMAGE, Marker
from voco_jax.errors import UserError

WORDS = "Which is it", "A hen", "And how many", "Two hens", "Where are they"  # questions and answers in turn
SYSTEM_WORDS = "Speak of birds"
_COUNTS, _IMAGES = (1, 3, 5), (0, 1, 2)
_OF_SEQUENCES = "<s>", "</s>"  # stand around a text; what marks turns are other tokens


def chat_template_text(tokenizer) -> str | None:
    """A tokenizer's chat template, its default one of several; None where it has none."""
    found = tokenizer.chat_template
    if isinstance(found, dict):  # several, by name
        found = found.get("default", next(iter(found.values()), None))
    return found or None


def read_chat_template(text: str, tokenizer, image_token: str = IMAGE.value) -> ChatTemplate:
    """Our template that renders as a chat template does. UserError says what ours cannot express.

    `image_token` stands for an image in the chat template.
    """
    return _read(_Renderer(text, tokenizer, image_token), tokenizer)


def takes_parts(text: str, tokenizer) -> bool:
    """Whether a chat template renders messages in parts, images among them, as processors do; a language model's takes
    text alone. UserError for a template that cannot be rendered at all."""
    render = _Renderer(text, tokenizer, IMAGE.value)
    return all(isinstance(render.find(_Asked(1, images)), tuple) for images in _IMAGES)


def missing_tokens(template: ChatTemplate, tokenizer) -> list[str]:
    """Control tokens of a template that a tokenizer has not."""
    known = tokenizer.get_added_vocab()
    return [token for token in template.control_tokens if token not in known]


def fitting_templates(tokenizer) -> list[str]:
    """Names of the templates whose control tokens a tokenizer has."""
    return [name for name, template in CHAT_TEMPLATES.items() if not missing_tokens(template, tokenizer)]


def named_alike(text: str, tokenizer, image_token: str = IMAGE.value, *, about_images: bool) -> str | None:
    """The template of ours, by name, with which a first question is asked as with a chat template that
    `read_chat_template` refuses; None for none. `about_images`: also a question about images, whose text plain LLaVA
    alone has from its template."""
    counts = _IMAGES if about_images else (0,)
    try:
        render = _Renderer(text, tokenizer, image_token)
        asked = [render(WORDS[:1], images) for images in counts]
    except UserError:
        return None
    for name in fitting_templates(tokenizer):
        template = CHAT_TEMPLATES[name]
        if template.keeps_newlines and asked == [_ours(tokenizer, template, 1, images) for images in counts]:
            return name
    return None


def marks_turns(template: ChatTemplate, tokenizer) -> bool:
    """Whether turns begin or end with control tokens of their own, as `<|im_start|>`; not `<s>` and `</s>`."""
    found = ControlTokens(tokenizer, template.texts).ids.keys() - {*_OF_SEQUENCES, IMAGE.value}
    return any(token in text for token in found for text in (template.user, template.assistant))


def _read(render: "_Renderer", tokenizer) -> ChatTemplate:
    asked, answered, again = WORDS[:3]
    first, conversation = render([asked]), render(WORDS[:3])
    closed, closed_again = (render(WORDS[:count], asks=False) for count in (2, 4))
    for whole, part in ((conversation, first), (conversation, closed), (render(WORDS), closed_again)):
        _check_begins(whole, part)
    begin, assistant = _around(first, asked)
    _, between, end = _around(closed, asked, answered)
    _, _, after, _ = _around(conversation, asked, answered, again)
    user = after.removeprefix(end)
    if not begin.endswith(user):
        raise UserError(f"the first question begins with {begin!r}, a later one with {user!r}")
    for text, answers in ((closed, WORDS[1:2]), (closed_again, WORDS[1:4:2])):
        _check_marked(text, answers, render.marked(len(answers) * 2))
    eos = tokenizer.eos_token
    template = ChatTemplate(
        system=begin.removesuffix(user), user=user, assistant=assistant, answer=between.removeprefix(assistant),
        end=end.replace(eos, EOS), with_system=render.with_system(), keeps_newlines=True,
    )  # fmt: skip
    template = render.with_images(template, tokenizer)
    for count in _COUNTS:
        for images in _IMAGES:
            ours, theirs = _ours(tokenizer, template, count, images), render(WORDS[:count], images)
            if ours != theirs:
                raise UserError(f"{count} turns with {images} images: expected {theirs!r}, found {ours!r}")
    return template


def _ours(tokenizer, template: ChatTemplate, count: int, images: int, system: str | None = None) -> str:
    """The first `count` turns, as a template of ours renders them."""
    encoder = Encoder(tokenizer, template, 0, 1, compressed=False, verbatim=True)
    turns: list[tuple[str | Marker, ...]] = [(text,) for text in WORDS[:count]]
    turns[0] = encoder.question(WORDS[0], images)
    pieces = encoder.dialogue(turns, system)
    return "".join(piece.value if isinstance(piece, Marker) else piece.text for piece in pieces)


def _check_begins(whole: str, part: str) -> None:
    """UserError unless a conversation begins as its first turns do."""
    same = len(os.path.commonprefix([whole, part]))
    if same < len(part):
        before = max(0, same - 20)
        expected, found = part[before : same + 30], whole[before : same + 30]
        raise UserError(f"a conversation that goes on is rendered otherwise: expected {expected!r}, found {found!r}")


def _check_marked(text: str, answers: Sequence[str], marked: Sequence[tuple[int, int]] | None) -> None:
    """UserError where `{% generation %}` does not mark the answers, which are what is trained on."""
    if marked is None:
        return
    found = [text[start:end] for start, end in marked]
    if len(found) != len(answers) or any(said not in span for said, span in zip(answers, found, strict=True)):
        raise UserError(f"{{% generation %}}: expected the answers {list(answers)}, found {found!r:.200}")
    if any(said in span for said in WORDS[::2] for span in found):
        raise UserError(f"{{% generation %}}: expected no question, found {found!r:.200}")


class _Asked(NamedTuple):
    """A conversation to render: the first `turns` of `WORDS`, about images, after a system text or without one."""

    turns: int
    images: int = 0
    asks: bool = True
    system: bool = False
    in_parts: bool = True  # a processor's template takes a list of parts; a language model's takes text

    def messages(self) -> list[dict]:
        """In transformers' form; in text, with LLaVA's image markers."""
        said = [("system", SYSTEM_WORDS)] if self.system else []
        said += [("assistant" if i % 2 else "user", words) for i, words in enumerate(WORDS[: self.turns])]
        messages = []
        for role, words in said:
            marks = self.images if words == WORDS[0] else 0
            content: str | list[dict] = IMAGE.value * marks + ("\n" if marks else "") + words
            if self.in_parts:
                content = [*[{"type": "image"}] * marks, {"type": "text", "text": words}]
            messages.append({"role": role, "content": content})
        return messages


class _Renderer:
    """transformers' renderings of all conversations that are needed, made at once by one process."""

    def __init__(self, text: str, tokenizer, image_token: str):
        self._image_token = image_token
        variables = tokenizer.special_tokens_map | {"enable_thinking": False}
        self._rendered = _render(text, json.dumps(variables))
        self._marks = any(spans for _, spans, _ in self._rendered.values())

    def __call__(self, words: Sequence[str], images: int = 0, *, asks: bool = True, system: bool = False) -> str:
        return self._find(_Asked(len(words), images, asks, system))[0]

    def _find(self, asked: _Asked) -> tuple[str, list[tuple[int, int]]]:
        """(text, places of `{% generation %}` in it)"""
        problem = None
        for in_parts in (True, False):  # text may keep what parts lose
            found = self.find(asked._replace(in_parts=in_parts))
            if isinstance(found, tuple):
                return found
            problem = problem or found
        raise UserError(problem or "the turns' texts are not in what it renders")

    def find(self, asked: _Asked) -> tuple[str, list[tuple[int, int]]] | str | None:
        """The same of parts or of text alone, or what is wrong; None where it does not render what is said."""
        rendered, spans, error = self._rendered[asked]
        if rendered is None:
            return error
        if asked.in_parts and asked.images and self._loses_images(asked, rendered):
            return f"an image before a question: expected {IMAGE.value}, found none"
        rendered = rendered.replace(self._image_token, IMAGE.value)
        words = [*WORDS[: asked.turns], *[SYSTEM_WORDS] * asked.system]
        if all(rendered.count(said) == 1 for said in words) and "'text'" not in rendered:
            return rendered, spans
        return None

    def _loses_images(self, asked: _Asked, rendered: str) -> bool:
        """Whether a conversation is rendered as one without images, spaces aside."""
        without = self._rendered[asked._replace(images=0)][0]
        return without is not None and rendered.split() == without.split()

    def marked(self, turns: int) -> list[tuple[int, int]] | None:
        """What the template marks of so many turns; None for a template that marks nothing."""
        return self._find(_Asked(turns, asks=False))[1] if self._marks else None

    def with_system(self) -> str:
        """All that stands before the first question, with `{system}` for a system text; '' where it has no place before
        the first question, whatever follows."""
        try:
            whole = [self(WORDS[:turns], system=True) for turns in _COUNTS]
            forms = {text.partition(WORDS[0])[0].replace(SYSTEM_WORDS, SYSTEM) for text in whole}
            rest = all(
                text.partition(WORDS[0])[2] == self(WORDS[:turns]).partition(WORDS[0])[2]
                for turns, text in zip(_COUNTS, whole, strict=True)
            )
        except UserError:
            return ""
        form = forms.pop()
        return form if rest and not forms and form.count(SYSTEM) == 1 else ""

    def with_images(self, template: ChatTemplate, tokenizer) -> ChatTemplate:
        """The template with its texts for each image before a question, after all of them, and in their place."""
        asked = WORDS[0]
        begin, rest = template.system + template.user, asked + template.assistant
        with_images = [self([asked], n) for n in (1, 2)]
        same = os.path.commonprefix([begin, *with_images])
        without, user = begin.removeprefix(same), template.user
        if not user.endswith(without):
            raise UserError(f"an image before a question: expected {begin!r} before it, found {with_images[0]!r}")
        one, two = (text.removeprefix(same).removesuffix(rest) for text in with_images)
        if one.count(IMAGE.value) != 1 or two.count(IMAGE.value) != 2:
            raise UserError(f"an image before a question: expected {IMAGE.value}, found {one!r}")
        image = next((one[:n] for n in range(len(one), 0, -1) if two == one[:n] * 2 + one[n:]), one)
        special = ControlTokens(tokenizer).ids.keys() - {IMAGE.value}
        if any(token in one for token in special):
            raise UserError(f"an image before a question: expected {IMAGE.value} and text, found {one!r}")
        with_system = template.with_system
        if without and with_system:
            with_system = with_system.removesuffix(without) if with_system.endswith(without) else ""
        return dataclasses.replace(
            template, user=user.removesuffix(without), with_system=with_system, image=image,
            after_images=one.removeprefix(image), without_images=without,
        )  # fmt: skip


@functools.lru_cache(maxsize=16)  # one that is refused is asked for again, to find one that is alike
def _render(text: str, variables: str) -> dict[_Asked, tuple[str | None, list[tuple[int, int]], str | None]]:
    """(text, marked places, error) of each conversation, with these variables (JSON). UserError for a template that
    takes too long."""
    conversations = [_Asked(turns, images) for turns in _COUNTS for images in _IMAGES]
    conversations += [_Asked(turns, asks=False) for turns in (2, 4)]
    conversations += [_Asked(turns, system=True) for turns in _COUNTS]
    conversations = [one._replace(in_parts=in_parts) for one in conversations for in_parts in (True, False)]
    asked = {
        "template": text, "variables": json.loads(variables),
        "conversations": [[one.messages(), one.asks] for one in conversations],
    }  # fmt: skip
    program = Path(__file__).with_name("template_process.py")
    try:
        # -P: the program must not import the modules beside it
        process = subprocess.run(
            [sys.executable, "-P", program], input=json.dumps(asked), capture_output=True, text=True, timeout=60
        )
    except subprocess.TimeoutExpired:
        raise UserError("it takes too long") from None
    if process.returncode:
        ended = -process.returncode in (signal.SIGXCPU, signal.SIGKILL)
        last = (process.stderr.splitlines() or ["no reason given"])[-1]
        raise UserError("it takes too long" if ended else f"it cannot be rendered: {last}")
    rendered = ((text, [tuple(span) for span in spans], error) for text, spans, error in json.loads(process.stdout))
    return dict(zip(conversations, rendered, strict=True))


def _around(text: str, *words: str) -> list[str]:
    """The text before, between and after words that stand in it in this order."""
    parts = []
    for word in words:
        before, found, text = text.partition(word)
        if not found:
            raise UserError("it renders the turns in another order")
        parts.append(before)
    return [*parts, text]
