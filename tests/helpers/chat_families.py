"""Chat templates of language models' families as their tokenizers have them, without the branches for tools; and small
tokenizers with the families' control tokens."""

import functools
import json
from pathlib import Path
import tempfile
from typing import Any

import tokenizers

from tests.helpers.tokenizer_kinds import byte_level, directory
from voco_jax.data.tokenizer import load_tokenizer

QWEN_2_5 = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# The same with what is to be learned marked, as trainers write it
QWEN_2_5_MARKED = QWEN_2_5.replace(""" or (message.role == "assistant") %}""", " %}").replace(
    """    {%- endif %}
{%- endfor %}""",
    """    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- endif %}
{%- endfor %}""",
)
QWEN_3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') }}
                {{- '\\n</think>\\n\\n' }}
                {{- content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Of LLaVA-Interleave and LLaVA-OneVision, in which a conversation that goes on is not what was asked
LLAVA_QWEN = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA_3_SYSTEM = """{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
LLAMA_3_1 = f"""{{{{- bos_token }}}}
{{%- if not date_string is defined %}}
    {{%- set date_string = "26 Jul 2024" %}}
{{%- endif %}}
{_LLAMA_3_SYSTEM}"""
LLAMA_3_2 = f"""{{{{- bos_token }}}}
{{%- if not date_string is defined %}}
    {{%- if strftime_now is defined %}}
        {{%- set date_string = strftime_now("%d %b %Y") %}}
    {{%- else %}}
        {{%- set date_string = "26 Jul 2024" %}}
    {{%- endif %}}
{{%- endif %}}
{_LLAMA_3_SYSTEM}"""
MISTRAL_1 = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, roles must alternate user/assistant/...') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- " [INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token}}
    {%- endif %}
{%- endfor %}
"""
MISTRAL_3 = MISTRAL_1.replace("loop.first and system_message", "loop.last and system_message")
MISTRAL_3 = MISTRAL_3.replace('" [INST] "', '"[INST] "').replace('" [/INST]"', '"[/INST]"')
# Of Llama 2's chat models: a space stands before the token that ends an answer
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = 'A chat between a curious user and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user\\'s questions.' %}{% endif %}{{ system_message }}"
    "{% for message in loop_messages %}{% if message['role'] == 'user' %}{{ ' USER: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ASSISTANT: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)

_QWEN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_QWEN_NAMED = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
_LLAMA_3 = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
)
_LLAMA_3_NAMED = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
_MISTRAL_NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# By family: its chat template, its control tokens in the order of their ids, which are BOS and EOS, which end an answer
FAMILIES: dict[str, tuple[str, tuple[str, ...], dict[str, str | None], tuple[str, ...]]] = {
    "qwen2.5": (QWEN_2_5, _QWEN, _QWEN_NAMED, ("<|im_end|>", "<|endoftext|>")),
    "qwen2.5 marked": (QWEN_2_5_MARKED, _QWEN, _QWEN_NAMED, ("<|im_end|>", "<|endoftext|>")),
    "qwen3": (QWEN_3, (*_QWEN, "<think>", "</think>"), _QWEN_NAMED, ("<|im_end|>", "<|endoftext|>")),
    "smollm2": (
        SMOLLM2, _QWEN, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"},
        ("<|im_end|>",),
    ),
    "llava_qwen": (LLAVA_QWEN, (*_QWEN, "<image>"), _QWEN_NAMED, ("<|im_end|>",)),
    "llama3.1": (LLAMA_3_1, _LLAMA_3, _LLAMA_3_NAMED, ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")),
    "llama3.2": (LLAMA_3_2, _LLAMA_3, _LLAMA_3_NAMED, ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")),
    "llama2": (LLAMA_2, ("<unk>", "<s>", "</s>"), _MISTRAL_NAMED, ("</s>",)),
    "mistral-v0.1": (MISTRAL_1, ("<unk>", "<s>", "</s>"), _MISTRAL_NAMED, ("</s>",)),
    "mistral-v0.3": (MISTRAL_3, ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"), _MISTRAL_NAMED, ("</s>",)),
    "vicuna": (VICUNA, ("<unk>", "<s>", "</s>"), _MISTRAL_NAMED, ("</s>",)),
}  # fmt: skip
_BEGINS = (
    "llama2",
    "llama3.1",
    "llama3.2",
    "mistral-v0.1",
    "mistral-v0.3",
    "vicuna",
)  # whose tokenizers put BOS before a text


def tokenizer_files(path: Path, family: str) -> Path:
    """A directory as a checkpoint of the family has it."""
    template, special, named, stop = FAMILIES[family]
    backend = byte_level([token for token in ("<s>", "</s>") if token in special])
    backend.add_special_tokens(list(special))
    if family in _BEGINS:
        bos = named["bos_token"]
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, backend.token_to_id(bos))]
        )
    config: dict[str, Any] = named | {"chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast"}
    generation = {"eos_token_id": [backend.token_to_id(token) for token in stop], "temperature": 0.7}
    files = {"tokenizer_json": json.loads(backend.to_str()), "tokenizer_config_json": config}
    return directory(path, **files, generation_config_json=generation)


@functools.cache
def tokenizer_of(family: str):
    """A small tokenizer with the family's control tokens and chat template, and `<voco>`."""
    with tempfile.TemporaryDirectory() as temporary:
        return load_tokenizer(tokenizer_files(Path(temporary) / "t", family))
