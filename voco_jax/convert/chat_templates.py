"""The chat template of a checkpoint: where it stands, and ours as one of transformers."""

from pathlib import Path

from voco_jax.chat_templates import EOS, SYSTEM
from voco_jax.data.control_tokens import ControlTokens
from voco_jax.data.conversations import Encoder
from voco_jax.data.template_reader import chat_template_text
from voco_jax.data.tokenizer import VOCO_TOKEN
from voco_jax.data.turns import IMAGE
from voco_jax.errors import UserError
from voco_jax.io.files import read_text
from voco_jax.io.json_files import read_object
from voco_jax.outages import first_line

_MOST = 2**20  # bytes of a template


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
    file = directory if directory.suffix == ".gguf" else directory / "tokenizer_config.json"
    found = chat_template_text(tokenizer)
    return None if not found else (_text(found, file), file.name)


def image_token_of(directory: Path) -> str:
    """The text that stands for an image in a checkpoint's chat template."""
    file = directory / "processor_config.json"
    token = read_object(file).get("image_token") if file.exists() else None
    return token if isinstance(token, str) and token else IMAGE.value


def write_chat_template(encoder: Encoder) -> str:
    """A chat template that renders a plain LLaVA's conversations as its prompt, for a tokenizer with an image token.

    Turns come in parts, or as text.
    """
    t, tokenizer = encoder.template, encoder.tokenizer
    after = t.after_images
    if IMAGE.value not in ControlTokens(tokenizer).ids:  # text after an image begins as a text does, or a word more
        expected = tokenizer(f"{after}x", add_special_tokens=False).input_ids
        spaced = f" {after}"
        if tokenizer(f"{VOCO_TOKEN}{spaced}x", add_special_tokens=False).input_ids[1:] == expected:
            after = spaced
    text = "{% for part in turn['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    text = f"{{% if turn['content'] is string %}}{{{{ turn['content'] }}}}{{% else %}}{text}{{% endif %}}"
    image = f"{_said(t.image)}{{% if loop.last %}}{_said(after)}{{% endif %}}{{% else %}}{_said(t.without_images)}"
    images = "{% for part in turn['content'] if part['type'] == 'image' %}" + image + "{% endfor %}"
    asks = "{% if not loop.last or add_generation_prompt %}" + _said(t.assistant) + "{% endif %}"
    before, _, behind = t.with_system.partition(SYSTEM)
    begin = t.system + t.user if encoder.system is None else before + encoder.system + behind
    system = f"{_said(before)}{text}{_said(behind)}"
    if not t.with_system:
        system = "{{ raise_exception('the prompt has no place for a system text') }}"
    later = f"{{% elif messages[0]['role'] != 'system' or loop.index > 2 %}}{_said(t.user)}{{% endif %}}"
    written = (
        f"{{% for turn in messages %}}{{% if turn['role'] == 'system' %}}{system}"
        f"{{% elif turn['role'] == 'user' %}}{{% if loop.first %}}{_said(begin)}{later}{images}{text}{asks}"
        f"{{% else %}}{_said(t.answer)}{text}{_said(t.end)}{{% endif %}}{{% endfor %}}"
    )
    return written.replace(EOS, tokenizer.eos_token)


def _said(text: str) -> str:
    """What renders a text, in Jinja."""
    return f"{{{{ {text!r} }}}}" if text else ""


def _text(found, file: Path) -> str:
    if not isinstance(found, str):
        raise UserError(f"{file}: chat_template: expected text, found {found!r:.100}")
    return found
