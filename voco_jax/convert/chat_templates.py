"""A checkpoint's chat template (Jinja, as in transformers) as one of ours, and back.

transformers renders the template for a few conversations, in its sandbox and in a process of its own. The text around
the conversations' words becomes our template. It must render other conversations alike; a template that computes
something else is refused.
"""

from collections.abc import Sequence
import json
from pathlib import Path
import signal
import subprocess
import sys

from voco_jax.chat_templates import EOS, ChatTemplate
from voco_jax.data.control_tokens import ControlTokens
from voco_jax.data.conversations import Encoder
from voco_jax.data.tokenizer import VOCO_TOKEN
from voco_jax.data.turns import IMAGE, Marker
from voco_jax.errors import UserError
from voco_jax.io.files import read_text
from voco_jax.io.json_files import read_object
from voco_jax.outages import first_line

_MOST = 2**20  # bytes of a template
WORDS = "Which is it", "A hen", "And how many", "Two hens", "Where are they"  # questions and answers in turn


def chat_template_of(directory: Path, tokenizer) -> tuple[str, str] | None:
    """(template, name of its file) of a checkpoint's directory or tokenizer; None where there is none.

    A processor's template is a file of its own; older tokenizers have it in their config.
    """
    own, older = directory / "chat_template.jinja", directory / "chat_template.json"
    try:
        if own.exists():
            return read_text(own, _MOST), own.name
    except (OSError, ValueError) as error:
        raise UserError(f"{own}: cannot be read: {first_line(error)}") from None
    if older.exists():
        return _text(read_object(older).get("chat_template"), older), older.name
    found = tokenizer.chat_template
    if isinstance(found, dict):  # several, by name
        found = found.get("default", next(iter(found.values()), None))
    return None if not found else (_text(found, directory / "tokenizer_config.json"), "tokenizer_config.json")


def image_token_of(directory: Path) -> str:
    """The text that stands for an image in a checkpoint's chat template."""
    file = directory / "processor_config.json"
    token = read_object(file).get("image_token") if file.exists() else None
    return token if isinstance(token, str) and token else IMAGE.value


def read_chat_template(text: str, tokenizer, image_token: str = IMAGE.value) -> ChatTemplate:
    """Our template that renders as a chat template does. UserError says what ours cannot express.

    `image_token` stands for an image in the chat template.
    """
    render = _Renderer(text, tokenizer, image_token)
    asked, answered, again = WORDS[:3]
    first = render([asked])
    conversation = render([asked, answered, again])
    closed = render([asked, answered], asks=False)
    begin, assistant = _around(first, asked)
    begins, between, after, assistant_again = _around(conversation, asked, answered, again)
    _, _, end = _around(closed, asked, answered)
    alike = (begins, assistant_again) == (begin, assistant)
    if not (alike and between.startswith(assistant) and after.startswith(end)):
        raise UserError("what stands around a turn depends on the turns beside it")
    user = after.removeprefix(end)
    if not begin.endswith(user):
        raise UserError(f"the first question begins with {begin!r}, a later one with {user!r}")
    image, after_images = render.images(asked, begin, assistant)
    eos = tokenizer.eos_token
    template = ChatTemplate(
        system=begin.removesuffix(user), user=user, assistant=assistant, answer=between.removeprefix(assistant),
        end=end.replace(eos, EOS), image=image, after_images=after_images,
    )  # fmt: skip
    encoder = Encoder(tokenizer, template, 0, 1, compressed=False, verbatim=True)
    for count in (1, 3, 5):
        for images in (0, 1, 2):
            turns: list[tuple[str | Marker, ...]] = [(text,) for text in WORDS[:count]]
            turns[0] = encoder.question(WORDS[0], images)
            pieces = encoder.dialogue(turns)
            ours = "".join(piece.value if isinstance(piece, Marker) else piece.text for piece in pieces)
            if ours != (theirs := render(WORDS[:count], images)):
                raise UserError(f"{count} turns with {images} images: expected {theirs!r}, found {ours!r}")
    return template


def write_chat_template(encoder: Encoder) -> str:
    """A chat template that renders a plain LLaVA's conversations as its prompt, for a tokenizer with an image token."""
    t, tokenizer = encoder.template, encoder.tokenizer
    after = t.after_images
    if IMAGE.value not in ControlTokens(tokenizer).ids:  # text after an image begins as a text does, or a word more
        expected = tokenizer(f"{after}x", add_special_tokens=False).input_ids
        spaced = f" {after}"
        if tokenizer(f"{VOCO_TOKEN}{spaced}x", add_special_tokens=False).input_ids[1:] == expected:
            after = spaced
    text = "{% for part in turn['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    image = f"{{{{ {t.image!r} }}}}{{% if loop.last %}}{{{{ {after!r} }}}}{{% endif %}}"
    images = "{% for part in turn['content'] if part['type'] == 'image' %}" + image + "{% endfor %}"
    asks = "{% if not loop.last or add_generation_prompt %}" + f"{{{{ {t.assistant!r} }}}}" + "{% endif %}"
    end = t.end.replace(EOS, tokenizer.eos_token)
    return (
        f"{{{{ {t.system!r} }}}}{{% for turn in messages %}}"
        f"{{% if turn['role'] == 'user' %}}{{{{ {t.user!r} }}}}{images}{text}{asks}"
        f"{{% else %}}{{{{ {t.answer!r} }}}}{text}{{{{ {end!r} }}}}{{% endif %}}{{% endfor %}}"
    )


class _Renderer:
    """transformers' renderings of all conversations that are needed, made at once by one process."""

    def __init__(self, text: str, tokenizer, image_token: str):
        self._tokenizer, self._image_token = tokenizer, image_token
        asked = [(count, images, True) for count in (1, 3, 5) for images in (0, 1, 2)] + [(2, 0, False)]
        # A processor's template takes a list of parts; a language model's takes text, here with LLaVA's image marker
        calls = [(*call, in_parts) for call in asked for in_parts in (True, False)]
        conversations = [[_messages(count, images, in_parts), asks] for count, images, asks, in_parts in calls]
        self._rendered = dict(zip(calls, _render(text, tokenizer.special_tokens_map, conversations), strict=True))

    def __call__(self, words: Sequence[str], images: int = 0, *, asks: bool = True) -> str:
        problem = None
        for in_parts in (True, False):
            rendered, error = self._rendered[len(words), images, asks, in_parts]
            if rendered is None:
                problem = problem or error
                continue
            rendered = rendered.replace(self._image_token, IMAGE.value)
            if all(rendered.count(said) == 1 for said in words) and "'text'" not in rendered:
                return rendered
        raise UserError(problem or "the turns' texts are not in what it renders")

    def images(self, asked: str, begin: str, assistant: str) -> tuple[str, str]:
        """The text for each image before a question, and the text after all of them."""
        one, two = (self([asked], n).removeprefix(begin).removesuffix(asked + assistant) for n in (1, 2))
        if one.count(IMAGE.value) != 1 or two.count(IMAGE.value) != 2:
            raise UserError(f"an image before a question: expected {IMAGE.value}, found {one!r}")
        image = next((one[:n] for n in range(len(one), 0, -1) if two == one[:n] * 2 + one[n:]), one)
        special = ControlTokens(self._tokenizer).ids.keys() - {IMAGE.value}
        if any(token in one for token in special):
            raise UserError(f"an image before a question: expected {IMAGE.value} and text, found {one!r}")
        return image, one.removeprefix(image)


def _messages(count: int, images: int, in_parts: bool) -> list[dict]:
    """The first `count` turns, in transformers' form."""
    messages = []
    for i, said in enumerate(WORDS[:count]):
        marks = 0 if i else images
        content = IMAGE.value * marks + ("\n" if marks else "") + said
        if in_parts:
            content = [*[{"type": "image"}] * marks, {"type": "text", "text": said}]
        messages.append({"role": "assistant" if i % 2 else "user", "content": content})
    return messages


def _render(text: str, special_tokens: dict, conversations: list) -> list[tuple[str | None, str | None]]:
    """(text, None) or (None, error) for each conversation. UserError for a template that takes too long."""
    program = Path(__file__).with_name("template_process.py")
    asked = {"template": text, "special_tokens": special_tokens, "conversations": conversations}
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
    return json.loads(process.stdout)


def _around(text: str, *words: str) -> list[str]:
    """The text before, between and after words that stand in it in this order."""
    parts = []
    for word in words:
        before, found, text = text.partition(word)
        if not found:
            raise UserError("it renders the turns in another order")
        parts.append(before)
    return [*parts, text]


def _text(found, file: Path) -> str:
    if not isinstance(found, str):
        raise UserError(f"{file}: chat_template: expected text, found {found!r:.100}")
    return found
