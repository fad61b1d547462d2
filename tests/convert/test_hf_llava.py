"""LLaVA checkpoints of transformers, converted: asked with transformers' own prompts, they give its greedy tokens."""

import json
import re

import numpy as np
from PIL import Image
import pytest
import transformers

from tests.conftest import DATA
from tests.convert.test_convert import convert  # noqa: F401 (a fixture)
from tests.convert.test_convert_parity import make_llava
import voco_jax
from voco_jax.api import Request
from voco_jax.chat_templates import CHAT_TEMPLATES
from voco_jax.checkpoint.init_from import begin_with_run
from voco_jax.config import default_config, find_problem, load_config
from voco_jax.convert.chat_templates import write_chat_template
from voco_jax.convert.sources import Source
from voco_jax.convert.to_jax import Options, choose_template
from voco_jax.data.conversations import Encoder
from voco_jax.data.from_config import template_of
from voco_jax.data.template_reader import read_chat_template
from voco_jax.data.tokenizer import load_tokenizer
from voco_jax.models.llama import LlamaConfig

pytestmark = pytest.mark.peer

PATCHES, IMAGE_ID, ROWS = 4, 32000, 32064
# transformers' own of LLaVA-1.5, with Jinja's `generation` block left out
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}{{ ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'][0]['text'] + eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (  # of a language model: its contents are text
    "A chat. {% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} {% else %}"
    "ASSISTANT: {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
LLAMA_3 = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + '<|eot|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)


def added(content: str, special: bool = True) -> dict:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": content, "special": special} | flags


BASE = {str(i): added(token) for i, token in enumerate(("<unk>", "<s>", "</s>"))}
BASE |= {"32000": added("<image>"), "32001": added("<pad>")}
AGES = {
    "4.36": {},
    "4.46": {"extra_special_tokens": {"image_token": "<image>"}, "image_token": "<image>"},
    "not special": {"added_tokens_decoder": BASE | {"32000": added("<image>", False)}},
}


@pytest.fixture(scope="module")
def model():
    model = make_llava(vocab_size=ROWS, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    model.config.image_token_index = IMAGE_ID
    return model


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    """A tokenizer of some age, and a chat template in some file."""
    made = tmp_path_factory.mktemp("tokenizer")
    transformers.AutoTokenizer.from_pretrained(DATA / "llama_tokenizer").save_pretrained(made)

    def make(age: str, template: str | None = None, file: str = "chat_template.jinja"):
        directory = tmp_path_factory.mktemp("llava")
        config = json.loads((DATA / "llama_tokenizer" / "tokenizer_config.json").read_text())
        config |= {"added_tokens_decoder": BASE, "pad_token": "<pad>"} | AGES[age]
        backend = json.loads((made / "tokenizer.json").read_text())
        backend["added_tokens"] = [{"id": int(i)} | token for i, token in config["added_tokens_decoder"].items()]
        (directory / "tokenizer.json").write_text(json.dumps(backend))
        if file == "tokenizer_config.json":
            config["chat_template"] = template
        elif template is not None:
            content = template if file.endswith("jinja") else json.dumps({"chat_template": template})
            (directory / file).write_text(content)
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        return directory

    return make


@pytest.fixture(scope="module")
def checkpoint(model, tokenizer_dir):
    """A whole one."""
    directory = tokenizer_dir("4.46", LLAVA)
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    transformers.CLIPImageProcessor(**size).save_pretrained(directory)
    model.save_pretrained(directory)
    return directory


def processor_of(directory):
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28),
        tokenizer=transformers.AutoTokenizer.from_pretrained(directory),
        patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip


def encoder_of(directory) -> tuple[Encoder, list[str]]:
    """As `to_jax` makes a run's of such a directory; and its warnings."""
    config, tokenizer = default_config(), load_tokenizer(directory)
    warnings = choose_template(
        config.data, Source("llava-hf", directory, LlamaConfig()), tokenizer, Options(compressor="none")
    )
    return Encoder(tokenizer, template_of(config), 0, PATCHES, compressed=False, verbatim=True), warnings


def ids_of(sample) -> list[int]:
    return np.where(sample.slot_index >= 0, IMAGE_ID, sample.tokens).tolist()


def turns(*values) -> list[dict]:
    return [{"from": "gpt" if i % 2 else "human", "value": value} for i, value in enumerate(values)]


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8))


CHAT = {
    "jinja": (LLAVA, "chat_template.jinja"),
    "json": (MISTRAL, "chat_template.json"),
    "tokenizer": (VICUNA, "tokenizer_config.json"),
    "none": (None, ""),
}
V1 = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


@pytest.mark.parametrize(
    ("age", "kind"), [("4.36", "jinja"), ("4.46", "json"), ("not special", "tokenizer"), ("4.46", "none")]
)
def test_the_prompt_is_transformers(tokenizer_dir, photo, age, kind):
    template, file = CHAT[kind]
    source = tokenizer_dir(age, template, file)
    (encoder, warnings), processor = encoder_of(source), processor_of(source)
    assert not warnings

    def theirs(text: str, images: int) -> list[int]:
        has_bos = text.startswith(processor.tokenizer.bos_token)
        return processor(text=text, images=[photo] * images or None, add_special_tokens=not has_bos).input_ids[0]

    def rendered(*said, images: int) -> str:
        messages = []
        for i, text in enumerate(said):
            count = 0 if i else images
            parts = [*[{"type": "image"}] * count, {"type": "text", "text": text}]
            in_parts = kind in ("jinja", "json")
            content = parts if in_parts else "<image>" * count + ("\n" if count else "") + text
            messages.append({"role": "assistant" if i % 2 else "user", "content": content})
        if kind == "none":
            texts = [
                f" ASSISTANT: {m['content']}</s>" if i % 2 else f"USER: {m['content']}" for i, m in enumerate(messages)
            ]
            return f"{V1}{''.join(texts)} ASSISTANT:"
        return processor.apply_chat_template(messages, chat_template=template, add_generation_prompt=True)

    for images, *said in (
        (0, "What is it?"),
        (1, "What is it?\nAnswer with a word."),
        (1, "What is it?", "A red bus.", "Why\n\nis it here?"),
        (2, "Which is larger?", "The left one.", "Über straße 你好?", "No", "x"),
    ):
        found = encoder.encode(turns(encoder.question(said[0], images), *((text,) for text in said[1:])), images)
        assert ids_of(found) == theirs(rendered(*said, images=images), images), said
        assert found.num_images == images
    if kind == "jinja":  # an image stands where the text has it
        found = encoder.encode(turns("is <image> red,\nor <image>?"), 2)
        assert ids_of(found) == theirs("USER: is <image> red,\nor <image>? ASSISTANT:", 2)


def test_greedy_tokens(model, checkpoint, photo, tmp_path, convert):  # noqa: F811
    """One turn, and two of which the second is asked in a prompt that holds the first."""
    assert convert("to-jax", checkpoint, tmp_path / "run", "--compressor", "none")[0] == 0
    ours, processor = voco_jax.load(tmp_path / "run"), processor_of(checkpoint)

    def theirs(prompt: str) -> str:
        inputs = processor(text=prompt, images=photo, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs.input_ids.shape[1] :]
        return processor.tokenizer.decode(tokens, skip_special_tokens=True)

    seen = ours.encode_images(photo)
    first, second = "What is this?\nAnswer with a word.", "Is it red?"
    answers = [theirs(f"USER: <image>\n{first} ASSISTANT:"), theirs(f"USER: <image>\n{second} ASSISTANT:")]
    assert ours.ask([first, second], seen, max_new_tokens=6) == [text.strip() for text in answers]
    assert len(set(answers)) == 2 and all(answers)
    chat = ours.chat(seen, max_new_tokens=6)
    again = theirs(f"USER: <image>\n{first} ASSISTANT: {answers[0]} USER: {second} ASSISTANT:")
    assert [chat.ask(first), chat.ask(second)] == [answers[0].strip(), again.strip()]

    # Trained further as LLaVA, with the same prompt; and an older run has no template of its own
    more = default_config()
    more.init_from, more.model.num_voco_tokens = str(tmp_path / "run"), 0
    assert find_problem(more) == ("model.num_voco_tokens", "expected at least 1, found 0")
    more.model.compressor = "none"
    assert find_problem(more) is None
    assert template_of(begin_with_run(more)) == ours.run.encoder.template != template_of(more)
    file = tmp_path / "run" / "config.json"
    older = json.loads(file.read_text())
    del older["data"]["custom_template"]
    (tmp_path / "older.json").write_text(json.dumps(older))
    assert load_config(tmp_path / "older.json").data.custom_template == default_config().data.custom_template

    # There and back: `<image>` is in the export, its chat template too
    assert convert("to-hf", tmp_path / "run", tmp_path / "theirs", "--format", "llava-hf")[0] == 0
    assert convert("to-jax", tmp_path / "theirs", tmp_path / "back", "--compressor", "none")[0] == 0
    back = voco_jax.load(tmp_path / "back")
    assert back.run.encoder.template == ours.run.encoder.template
    requests = [Request(first, seen), Request(f"{second} </s> <image>"), Request("<image> or", seen, interleaved=True)]
    for request in requests:
        (again,), (before,) = back.prompts([request]), ours.prompts([request])
        assert again.sample.tokens.tolist() == before.sample.tokens.tolist()
    assert back.run.checksums == ours.run.checksums


def test_labels_are_the_answers_and_their_ends(tokenizer_dir):
    """A template whose conversation goes on without an end-of-sequence token: training needs one all the same."""
    said = ("<image>\nWhat?", "A bus.", "Red?", "No.")
    for template, text in (
        (LLAVA, "USER: <image>\nWhat? ASSISTANT: A bus.</s> USER: Red? ASSISTANT: No.</s>"),
        (MISTRAL, "<s>[INST] <image>\nWhat? [/INST] A bus.</s>[INST] Red? [/INST] No.</s>"),
    ):
        encoder, _ = encoder_of(tokenizer_dir("4.36", template))
        sample = encoder.encode(turns(*said), 1)
        tokens = [t for t, v in zip(ids_of(sample), sample.slot_index % PATCHES, strict=True) if v in (0, PATCHES - 1)]
        expected = encoder.tokenizer(text, add_special_tokens=not text.startswith("<s>")).input_ids
        assert [t for t in ids_of(sample) if t != IMAGE_ID] == [t for t in expected if t != IMAGE_ID], tokens
        assert encoder.tokenizer.decode(sample.tokens[sample.labels]) == "A bus.</s> No.</s>"


def test_the_end_of_a_turn_is_its_own_token(tokenizer_dir):
    """`<|eot|>` in a chat template, where the tokenizer's end-of-sequence token is another."""
    tokenizer = load_tokenizer(tokenizer_dir("4.36"))
    tokenizer.add_tokens(["<|start|>", "<|end|>", "<|other|>", "\n\n"])
    tokenizer.add_tokens(["<|eot|>"], special_tokens=True)
    template = read_chat_template(LLAMA_3, tokenizer)
    encoder = Encoder(tokenizer, template, 0, PATCHES, compressed=False, verbatim=True)
    eot = tokenizer.convert_tokens_to_ids("<|eot|>")
    assert (encoder.stop_id, encoder.stop_ids) == (eot, (tokenizer.eos_token_id, eot))
    sample = encoder.encode(turns("Where?", "Here.", "What <|eot|> <|start|>\n\n<|other|>?", "That."), 0)
    assert tokenizer.decode(sample.tokens[sample.labels]) == "Here.<|eot|>That.<|eot|>"
    # After each turn, and none for what the user has written; what is no control token of the prompt stays a token
    counts = {
        name: (sample.tokens == tokenizer.convert_tokens_to_ids(name)).sum() for name in tokenizer.get_added_vocab()
    }
    assert (counts["<|eot|>"], counts["<|start|>"], counts["<|other|>"], counts["\n\n"]) == (4, 4, 1, 5)


def test_a_prompt_of_llavas_own_code(llama_tokenizer, tokenizer_dir):
    """Its code tokenizes what follows an image by itself, which for this tokenizer begins with `▁`. Exported, the chat
    template gives transformers these ids; and taken back, it asks with them."""
    encoder = Encoder(llama_tokenizer, CHAT_TEMPLATES["llava_v1"], 0, PATCHES, compressed=False, verbatim=True)
    question = "What is it?\nSay a word."
    values = (encoder.question(question, 1), ("A bus.",), ("Why?",))
    ours = ids_of(encoder.encode(turns(*values), 1))
    chunks = f"{V1}USER: ", f"\n{question} ASSISTANT: A bus.</s>USER: Why? ASSISTANT:"
    first, second = (llama_tokenizer(text, add_special_tokens=False).input_ids for text in chunks)
    assert ours == [1, *first, *[IMAGE_ID] * PATCHES, *second]

    template = write_chat_template(encoder)
    directory = tokenizer_dir("4.36", template)
    processor = processor_of(directory)
    content = [{"type": "text", "text": "A bus."}], [{"type": "text", "text": "Why?"}]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": content[0]},
        {"role": "user", "content": content[1]},
    ]
    text = processor.apply_chat_template(messages, chat_template=template, add_generation_prompt=True)
    image = Image.new("RGB", (28, 28))
    assert processor(text=text, images=image).input_ids[0] == ours
    again, warnings = encoder_of(directory)
    values = (again.question(question, 1), ("A bus.",), ("Why?",))
    assert not warnings and ids_of(again.encode(turns(*values), 1)) == ours


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}Turn {{ loop.index }}: {{ m['content'] }}\n{% endfor %}", "the first question begins"),
        ("{{ raise_exception('not for you') }}", "not for you"),
        ("{% for ", "unexpected 'end of template'"),
        ("hello", "the turns' texts are not in what it renders"),
        ("{{ messages.__class__.__mro__ }}{{ messages[0].__class__.__subclasses__() }}", "unsafe|access"),
        (LLAVA.replace("<image>", "<picture>"), "an image before a question: expected <image>"),
    ],
)
def test_a_chat_template_that_cannot_be_followed(tokenizer_dir, template, message):
    directory = tokenizer_dir("4.36", template)
    encoder, (warning,) = encoder_of(directory)
    assert encoder.template == CHAT_TEMPLATES["llava_v1"]
    assert "chat_template.jinja: a chat template that cannot be followed (" in warning and re.search(message, warning)
    assert warning.endswith("the prompt is llava_v1's; --template chooses another") and "\n" not in warning
