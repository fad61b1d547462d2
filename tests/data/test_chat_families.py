"""Chat templates of language models' families: literal prompts and labels, with and without picture and system text."""

import copy
import dataclasses
import functools

import numpy as np
import pytest

from tests.helpers.chat_families import FAMILIES, tokenizer_of
from voco_jax.chat_templates import CHAT_TEMPLATES, CUSTOM, TOKENIZER, ChatTemplate
from voco_jax.checkpoint.init_from import begin_with_run, inherited_prompt, other_pixels
from voco_jax.checkpoint.resume import continued
from voco_jax.config import default_config, first_difference, save_config
from voco_jax.data.conversations import ConversationError, Encoder
from voco_jax.data.from_config import TODAY, make_encoder, make_model_config, set_template, take_template, template_of
from voco_jax.data.records import Record
from voco_jax.data.samples import SampleMaker
from voco_jax.data.shards.record_packer import check_conversations
from voco_jax.data.template_reader import (
    fitting_templates,
    marks_turns,
    missing_tokens,
    named_alike,
    read_chat_template,
)
from voco_jax.data.tokenizer import save_tokenizer, train_tokenizer
from voco_jax.data.video import FrameSampling
from voco_jax.errors import UserError

SAID = "What is it?", "A bus.", "Red?", "No."
BRIEF = "Be brief."
VOCO = "<voco><voco>\n"
CHAT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclasses.dataclass(frozen=True)
class Expected:
    """Of one family: BOS, what stands before the first question, without and with a system text, and the turns."""

    template: str
    bos: str
    begin: str
    with_system: str | None
    turns: tuple[str, str, str, str]  # a question with what stands around it; an answer with its end; …
    labels: str


CHATML = ("What is it?<|im_end|>\n<|im_start|>assistant\n", "A bus.<|im_end|>")
CHATML += ("\n<|im_start|>user\nRed?<|im_end|>\n<|im_start|>assistant\n", "No.<|im_end|>")
USER, BRIEFLY = "<|im_start|>user\n", f"<|im_start|>system\n{BRIEF}<|im_end|>\n<|im_start|>user\n"
IM_ENDS = "A bus.<|im_end|>No.<|im_end|>"
LLAMA_3 = (
    "What is it?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "A bus.<|eot_id|>",
    "<|start_header_id|>user<|end_header_id|>\n\nRed?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "No.<|eot_id|>",
)  # fmt: skip
CUTTING = "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: "
LLAMA_3_1 = Expected(
    TOKENIZER, "<|begin_of_text|>",
    f"{CUTTING}26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
    f"{CUTTING}26 Jul 2024\n\n{BRIEF}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
    LLAMA_3, "A bus.<|eot_id|>No.<|eot_id|>",
)  # fmt: skip
EXPECTED = {
    "qwen2.5": Expected(
        TOKENIZER, "",
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n" + USER,
        BRIEFLY, CHATML, IM_ENDS,
    ),
    "qwen3": Expected(
        "qwen3", "", USER, BRIEFLY,
        (f"{CHATML[0]}<think>\n\n</think>\n\n", CHATML[1], f"{CHATML[2]}<think>\n\n</think>\n\n", CHATML[3]), IM_ENDS,
    ),
    # Its BOS is what turns begin with
    "smollm2": Expected(
        TOKENIZER, "",
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n" + USER,
        BRIEFLY, CHATML, IM_ENDS,
    ),
    "llava_qwen": Expected(
        "llava_qwen", "", "<|im_start|>user \n", f"<|im_start|>system \n{BRIEF}<|im_end|><|im_start|>user \n",
        ("What is it?<|im_end|><|im_start|>assistant\n", "A bus.<|im_end|>",
         "<|im_start|>user \nRed?<|im_end|><|im_start|>assistant\n", "No.<|im_end|>"), IM_ENDS,
    ),
    "llama3.1": LLAMA_3_1,
    "llama3.2": LLAMA_3_1,  # with another date
    "llama2": Expected(  # BOS is what its turns begin with
        TOKENIZER, "", "<s>[INST] ", f"<s>[INST] <<SYS>>\n{BRIEF}\n<</SYS>>\n\n",
        ("What is it? [/INST]", " A bus. </s>", "<s>[INST] Red? [/INST]", " No. </s>"), " A bus. </s> No. </s>",
    ),
    "mistral-v0.1": Expected(
        TOKENIZER, "<s>", " [INST] ", f" [INST] {BRIEF}\n\n",
        ("What is it? [/INST]", " A bus.</s>", " [INST] Red? [/INST]", " No.</s>"), " A bus.</s> No.</s>",
    ),
    "mistral-v0.3": Expected(
        TOKENIZER, "<s>", "[INST] ", None, ("What is it?[/INST]", " A bus.</s>", "[INST] Red?[/INST]", " No.</s>"),
        " A bus.</s> No.</s>",
    ),
    "vicuna": Expected(
        TOKENIZER, "<s>", f"{CHAT} USER: ", f"{BRIEF} USER: ",
        ("What is it? ASSISTANT:", " A bus.</s>", " USER: Red? ASSISTANT:", " No.</s>"), " A bus.</s> No.</s>",
    ),
}  # fmt: skip


@functools.cache
def chosen(family: str) -> tuple[str, ChatTemplate]:
    """The tokenizer's own template, or the named one that is alike."""
    tokenizer = tokenizer_of(family)
    try:
        return TOKENIZER, read_chat_template(tokenizer.chat_template, tokenizer)
    except UserError:
        name = named_alike(tokenizer.chat_template, tokenizer, about_images=True)
        return name, CHAT_TEMPLATES[name]


def encoder_of(family: str, **options) -> Encoder:
    return Encoder(tokenizer_of(family), chosen(family)[1], 2, 2, compressed=True, **options)


def turns(*values, system: str | None = None) -> list[dict]:
    said = [{"from": "gpt" if i % 2 else "human", "value": value} for i, value in enumerate(values)]
    return said if system is None else [{"from": "system", "value": system}, *said]


def text_of(family: str, sample, kept=None) -> str:
    """Its tokens as text, with the date of Llama 3.1's template."""
    text = tokenizer_of(family).decode(sample.tokens if kept is None else sample.tokens[kept])
    before, date, after = text.partition("Today Date: ")
    return f"{before}{date}26 Jul 2024{after[len('26 Jul 2024') :]}" if date else text


@pytest.mark.parametrize("family", EXPECTED)
def test_prompts_and_labels(family):
    expected, (name, template) = EXPECTED[family], chosen(family)
    assert name == expected.template
    begin, (asked, answer, again, last) = expected.begin, expected.turns
    for system in (None, BRIEF):
        if system and expected.with_system is None:
            break
        begin = expected.begin if system is None else expected.with_system
        for e, own in ((encoder_of(family), system), (encoder_of(family, system=system), None)):
            one = e.encode(turns(SAID[0], system=own), 0)
            assert text_of(family, one) == f"{expected.bos}{begin}{asked}" and not one.labels.any()
            more = e.encode(turns(*SAID, system=own), 0)
            assert text_of(family, more) == f"{expected.bos}{begin}{asked}{answer}{again}{last}"
            assert text_of(family, more, more.labels) == expected.labels
            # About a picture: its VoCo tokens and a newline, before all text; BOS is in the compress stream
            for question in (f"<image>\n{SAID[0]}", f"{SAID[0]}\n<image>"):
                seen = e.encode(turns(question, *SAID[1:], system=own), 1)
                assert text_of(family, seen) == f"{VOCO}{begin}{asked}{answer}{again}{last}"
                assert text_of(family, seen, seen.labels) == expected.labels
                assert seen.slot_index.tolist() == [0, 1] + [-1] * (len(seen) - 2)
        where = begin.removesuffix("\n") if template.without_images else begin  # its images come before the newline
        at_text = encoder_of(family, system=system, image_position="text")
        seen = at_text.encode(turns(f"<image>\n{SAID[0]}", *SAID[1:]), 1)
        assert text_of(family, seen) == f"{expected.bos}{where}{VOCO}{asked}{answer}{again}{last}"
        two = encoder_of(family, system=system).encode(turns(f"<image><image>\n{SAID[0]}", SAID[1]), 2)
        assert text_of(family, two) == f"{expected.bos}{where}{VOCO}{VOCO}{asked}{answer}"
        assert two.slot_index.max() == 3


@pytest.mark.parametrize("family", [f for f in EXPECTED if EXPECTED[f].template == TOKENIZER])
def test_ids_are_those_of_transformers(family):
    """Of text alone, BOS included once."""
    tokenizer, e = tokenizer_of(family), encoder_of(family)
    for system in (None, BRIEF)[: 1 if EXPECTED[family].with_system is None else 2]:
        messages = [{"role": "assistant" if i % 2 else "user", "content": said} for i, said in enumerate(SAID[:3])]
        messages = [*([] if system is None else [{"role": "system", "content": system}]), *messages]
        theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids
        has_bos = family != "vicuna"  # whose template leaves it to the tokenizer
        ours = e.encode(turns(*SAID[:3], system=system), 0).tokens.tolist()
        assert ours == theirs if has_bos else ours == [tokenizer.bos_token_id, *theirs]


def test_bos_stands_once():
    """In the compress stream; where turns begin with it, in their text too."""
    for family, prefix, expected in (
        ("llama3.1", ["<|begin_of_text|>"], [1, 0, 1]), ("mistral-v0.3", ["<s>"], [1, 0, 1]),
        ("smollm2", ["<|im_start|>"], [3, 3, 3]), ("qwen3", [], [0, 0, 0]),
    ):  # fmt: skip
        e = encoder_of(family)
        assert e.tokenizer.convert_ids_to_tokens(e.ids.prefix_ids) == prefix
        asked = [e.encode_question("Why?", images).tokens for images in (0, 1, 2)]
        assert [(tokens == e.tokenizer.bos_token_id).sum() for tokens in asked] == expected, family
        assert e.ids.suffix_ids == tuple(e.tokenizer("\n", add_special_tokens=False).input_ids)


def test_stop_tokens_are_the_models():
    for family, names in (
        ("qwen2.5", ["<|im_end|>", "<|endoftext|>"]), ("smollm2", ["<|im_end|>"]), ("mistral-v0.1", ["</s>"]),
        ("llama3.1", ["<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"]),
    ):  # fmt: skip
        e = encoder_of(family)
        assert e.tokenizer.convert_ids_to_tokens(e.stop_ids) == names
        assert e.tokenizer.convert_ids_to_tokens(e.stop_id) == names[0]


def test_generation_marks_what_is_trained_on():
    """transformers' mask of the assistant's tokens, where the template has it."""
    tokenizer = tokenizer_of("qwen2.5 marked")
    assert chosen("qwen2.5 marked") == chosen("qwen2.5")
    messages = [{"role": "assistant" if i % 2 else "user", "content": said} for i, said in enumerate(SAID)]
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ours = encoder_of("qwen2.5 marked").encode(turns(*SAID), 0)
    newline = tokenizer("\n", add_special_tokens=False).input_ids  # after the last answer, which nothing follows
    assert [*ours.tokens, *newline] == theirs.input_ids
    assert [*ours.labels.astype(int), 0] == theirs.assistant_masks
    # More that is marked, the header, is no label
    header, marks = "{{- '<|im_start|>assistant\\n' }}", "{%- generation %}"
    more = tokenizer.chat_template.replace(f"{header}\n        {marks}", f"{marks}{header}")
    assert more != tokenizer.chat_template and read_chat_template(more, tokenizer) == chosen("qwen2.5")[1]
    for said, found in (
        ("{{ m.content }}{% generation %}{{ '<|im_end|>' }}{% endgeneration %}", "['<|im_end|>', '<|im_end|>']"),
        ("{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}", "['Which is it', 'A hen']"),
    ):
        wrong = "{% for m in messages %}{{ m.role + ': ' }}" + said + "{% endfor %}"
        wrong += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
        with pytest.raises(UserError) as error:
            read_chat_template(wrong, tokenizer)
        assert str(error.value) == f"{{% generation %}}: expected the answers ['A hen'], found {found}"


# ---- From a config -----------------------------------------------------------------------------------------------


def config_of(**data):
    config = default_config()
    config.model.num_voco_tokens = 2
    config.tokenizer.source = "elsewhere"
    config.data.update(data)
    return config


def made(config, family: str) -> Encoder:
    return make_encoder(config, tokenizer_of(family), make_model_config(config, tokenizer_of(family)))


def test_the_tokenizers_own_is_stored():
    """As text: no later use reads the tokenizer's again."""
    config = config_of(template=TOKENIZER, system=BRIEF, image_position="text")
    assert take_template(config, tokenizer_of("smollm2")) == []
    assert template_of(config) == chosen("smollm2")[1]
    assert take_template(config, None) == []
    sample = made(config, "smollm2").encode_question(SAID[0])
    assert text_of("smollm2", sample) == f"{BRIEFLY}{VOCO}{CHATML[0]}"
    config = config_of(template=TOKENIZER)
    assert take_template(config, tokenizer_of("llama3.2")) == [TODAY]


def test_training_goes_on_with_a_runs_prompt(tmp_path):
    """Of control tokens: template, system text and place of images, where the config has the defaults; and says so."""
    base = config_of(template="chatml", system=BRIEF, image_position="text", image_grid=2)
    save_tokenizer(tokenizer_of("smollm2"), tmp_path / "tokenizer")

    def begun(**data):
        save_config(base, tmp_path / "config.json")
        config = config_of(**data)
        config.init_from = str(tmp_path)
        begun = begin_with_run(config)
        return begun, inherited_prompt(config, begun)

    config, said = begun()
    assert (config.data.template, config.data.system, config.data.image_position) == ("chatml", BRIEF, "text")
    assert said == (
        f"config.data.template: 'chatml'; config.data.system: 'Be brief.'; config.data.image_position: 'text', "
        f"as in {tmp_path}; for 'voco_v1', convert the base with to-jax --template voco_v1"
    )
    assert other_pixels(str(tmp_path), config.data) == (
        f"config.data.image_grid: {tmp_path} has 2, this config 1: the weights were trained on other pixels"
    )
    # A run that goes on has them too, whatever became of its base
    save_tokenizer(tokenizer_of("smollm2"), tmp_path / "run" / "tokenizer")
    save_config(config, tmp_path / "run" / "config.json")
    asked = config_of()
    asked.init_from = str(tmp_path)
    assert first_difference(continued(asked, tmp_path / "run"), config) is None
    config, said = begun(system="Speak.", template="chatml")
    assert config.data.system == "Speak." and said == f"config.data.image_position: 'text', as in {tmp_path}"
    config, said = begun(template="bare")
    assert (config.data.template, config.data.system, config.data.image_position, said) == ("bare", None, "front", "")
    base.data.template = "voco_v1"
    config, said = begun()
    assert (config.data.template, config.data.system, said) == ("voco_v1", None, "")
    # The tokenizer's own, without control tokens: a language model has it because someone asked for it, plain LLaVA
    # anyway
    save_tokenizer(tokenizer_of("llama2"), tmp_path / "tokenizer")
    set_template(base.data, chosen("llama2")[1])
    config, said = begun()
    assert template_of(config) == chosen("llama2")[1] and said.startswith("config.data.template: 'tokenizer'; ")
    base.model.compressor, base.model.num_voco_tokens = "none", 0
    config, said = begun()
    assert (config.data.template, said) == ("voco_v1", "")


def test_texts_beside_the_tokenizers_own_are_refused():
    """They would be taken for those that were read when the run began."""
    config = config_of(template=TOKENIZER)
    assert begin_with_run(config).data.custom_template == config.data.custom_template
    config.data.custom_template.user = "Q: "
    with pytest.raises(UserError, match="^config.data.custom_template.user: expected none with .*; found 'Q: ', which"):
        begin_with_run(config)
    config.data.template = CUSTOM
    assert template_of(begin_with_run(config)).user == "Q: "


def test_a_system_text_has_one_place():
    config = config_of(template=CUSTOM)
    for text in ("Be brief. USER: ", "{system} {system} USER: "):
        config.data.custom_template.with_system = text
        with pytest.raises(UserError, match=r"^config.data.custom_template.with_system: expected '\{system\}' in"):
            made(config, "qwen3")
    config.data.custom_template.with_system = "{system} USER: "
    assert made(config, "qwen3").template.with_system == "{system} USER: "


def test_what_cannot_be_followed_is_refused(small_tokenizer):
    with pytest.raises(UserError, match="expected a tokenizer with a chat template; this one has none"):
        take_template(config_of(template=TOKENIZER), small_tokenizer)
    with pytest.raises(UserError) as error:
        take_template(config_of(template=TOKENIZER), tokenizer_of("qwen3"))
    assert "cannot be followed (a conversation that goes on is rendered otherwise: expected" in str(error.value)
    assert "<think>" in str(error.value) and str(error.value).endswith("; 'qwen3' asks a first question alike")
    with pytest.raises(UserError, match=r"template: 'llama3' needs a tokenizer with the token '<\|begin_of_text\|>'"):
        made(config_of(template="llama3"), "qwen3")
    for name, family, token in (
        ("mistral", "qwen3", "<s>"), ("qwen3", "qwen2.5", "<think>"), ("chatml", "vicuna", r"<\|im_start\|>"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"template: '{name}' needs a tokenizer with the token '{token}'"):
            made(config_of(template=name), family)
    config = config_of(system=BRIEF)
    set_template(config.data, chosen("mistral-v0.3")[1])
    with pytest.raises(UserError, match="config.data.system: template 'tokenizer' has no place for a system text$"):
        made(config, "mistral-v0.3")
    with pytest.raises(UserError, match="config.data.system: template 'custom' has no place .*; config.data.custom_t"):
        made(config_of(template=CUSTOM, system=BRIEF), "qwen3")
    with pytest.raises(ConversationError, match="a system turn: the chat template has no place for one"):
        encoder_of("mistral-v0.3").encode(turns("Why?", system=BRIEF), 0)


def test_a_trained_tokenizer_has_the_control_tokens():
    for name, added in (("qwen3", ["<think>", "</think>"]), ("mistral", ["<s>"]), ("llama3", ["<|begin_of_text|>"])):
        template = CHAT_TEMPLATES[name]
        tokenizer = train_tokenizer(["a bus"], 300, template.control_tokens)
        assert not missing_tokens(template, tokenizer) and set(added) <= set(template.control_tokens)
        assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
        asked = Encoder(tokenizer, template, 2, 2, compressed=True).encode(turns("a bus", "<think> <s>"), 0).tokens
        found = tokenizer.convert_ids_to_tokens(asked)
        assert [found.count(token) for token in added] == [1] * len(added), name
    assert fitting_templates(tokenizer_of("vicuna")) == [*list(CHAT_TEMPLATES)[:7], "mistral"]


def in_parts(text: str, said: str) -> str:
    """A chat template of Qwen2.5's form that takes a message's text, and `said` of a list of parts."""
    of_parts = "{% for part in message.content %}" + said + "{% endfor %}"
    content = "{% if message.content is string %}{{ message.content }}{% else %}" + of_parts + "{% endif %}"
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
        + content
        + text
        + ("{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    )


def test_images_that_parts_lose_may_be_in_text():
    tokenizer, end = tokenizer_of("qwen2.5"), "{{ '<|im_end|>\n' }}"
    found = read_chat_template(in_parts(end, "{{ part.text }}{{ ' ' if part.type == 'image' }}"), tokenizer)
    assert found == dataclasses.replace(CHAT_TEMPLATES["chatml"], end="{eos}\n")
    assert (found.image, found.after_images) == ("<image>", "\n")
    # Other text for an image is no loss
    with pytest.raises(UserError, match=r"an image before a question: expected <image>, found '<\|endoftext\|>'"):
        read_chat_template(in_parts(end, "{{ '<|endoftext|>' if part.type == 'image' else part.text }}"), tokenizer)
    neither = in_parts(end, "{{ part.text }}").replace("{{ message.content }}", "{{ 'x' }}")
    with pytest.raises(UserError, match="^an image before a question: expected <image>, found none$"):
        read_chat_template(neither, tokenizer)


def test_a_template_is_alike_without_images():
    """Of which VoCo prompts have the place alone; plain LLaVA has what stands around them too."""
    tokenizer = tokenizer_of("qwen3")
    refused = "{%- if '<image>' in messages[0].content %}{{ raise_exception('no') }}{% endif %}"
    text = refused + tokenizer.chat_template
    assert [named_alike(text, tokenizer, about_images=images) for images in (False, True)] == ["qwen3", None]
    without_thinking = tokenizer_of("qwen2.5")
    assert named_alike(tokenizer.chat_template, without_thinking, about_images=False) is None
    changed = copy.copy(tokenizer)
    changed.chat_template = text
    with pytest.raises(UserError, match="; 'qwen3' asks a first question alike$"):
        take_template(config_of(template=TOKENIZER), changed)
    config = config_of(template=TOKENIZER)
    config.model.compressor, config.model.num_voco_tokens = "none", 0
    with pytest.raises(UserError, match="; name one of voco_v1, .*, plain, chatml, qwen3, llava_qwen$"):
        take_template(config, changed)


def test_a_system_text_in_the_released_prompt(small_tokenizer):
    """And control tokens in a conversation's system text are characters."""
    e = Encoder(small_tokenizer, CHAT_TEMPLATES["voco_v1"], 2, 2, compressed=True, system=BRIEF)
    sample = e.encode(turns("<image>\nwhat is it?", "a red cat"), 1)
    assert small_tokenizer.decode(sample.tokens) == f"{VOCO}{BRIEF} USER: what is it? ASSISTANT: a red cat</s>"
    sample = e.encode(turns("what is it?", system="</s> <voco>"), 0)
    assert small_tokenizer.decode(sample.tokens) == "<s></s> <voco> USER: what is it? ASSISTANT:"
    assert np.isin(sample.tokens, [e.ids.eos_token_id, e.ids.voco_token_id]).sum() == 0
    with pytest.raises(ConversationError, match="a system turn: the plain template has no place for one"):
        Encoder(small_tokenizer, CHAT_TEMPLATES["plain"], 2, 2, compressed=True).encode(
            turns("<image>", "a cat", system=BRIEF), 1
        )


def test_a_record_with_a_system_turn():
    """In training, as a question of evaluation, and on its way into shards."""
    record = Record(conversations=[turns(*SAID[:2], system=BRIEF), turns(SAID[0], SAID[1])])
    maker = SampleMaker(encoder_of("qwen3"), 0, 1, FrameSampling(1))
    asked = f"{CHATML[0]}<think>\n\n</think>\n\n"
    for conversation, begin in enumerate((BRIEFLY, USER)):
        sample, prompt = maker.sample(record, conversation, None).sample, maker.prompt(record, conversation, None)
        assert text_of("qwen3", prompt) == f"{begin}{asked}"
        assert text_of("qwen3", sample) == f"{begin}{asked}{CHATML[1]}"
    check_conversations(record)
    with pytest.raises(ConversationError, match=r"turn 0 \(system\): expected text"):
        check_conversations(Record(conversations=[turns(*SAID[:2], system=" ")]))


def test_which_templates_mark_turns():
    marked = {family for family in FAMILIES if marks_turns(chosen(family)[1], tokenizer_of(family))}
    assert FAMILIES.keys() - marked == {"vicuna", "mistral-v0.1", "llama2"}
