"""Chat templates as data: the text around a conversation's turns. Training, questions, chat and tools all use these.

A prompt is `system`, then for each turn of the user `user`, what is said, `assistant`, and for each answer `answer`,
what is said, `end`. `end` begins with the token that stops generation. A system text of one's own stands in
`with_system`, in place of `system` and the first `user`. No tokenizer and no model is imported here.
"""

from collections.abc import Mapping
import dataclasses
import re
from typing import Any

EOS = "{eos}"  # in a template: the tokenizer's end-of-sequence token
SYSTEM = "{system}"  # in `with_system`: the system text
CUSTOM = "custom"  # the template of `config.data.custom_template`
TOKENIZER = "tokenizer"  # the tokenizer's own, which `config.data.custom_template` gets when a run begins


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The text around the turns, spaces and special tokens included. The fields are `config.data.custom_template`'s.

    `plain` is captions alone: `<image>caption\\n`, no roles, every token a label.
    """

    system: str = ""  # before the first turn
    user: str = "USER: "  # before a question
    assistant: str = " ASSISTANT:"  # after a question
    answer: str = " "  # before an answer, where there is one
    end: str = EOS  # after an answer
    image: str = "<image>"  # each image before a question, and what follows it
    after_images: str = "\n"  # after all images before a question
    without_images: str = ""  # before a question that begins with no image
    with_system: str = ""  # all before the first question, with a system text `{system}`; "": it has no place
    keeps_newlines: bool = False  # of turns about images; the released code drops them, its prompt's too
    plain: bool = False

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts in which control tokens may stand."""
        return self.system, self.with_system, self.user, self.without_images, self.assistant, self.answer, self.end

    @property
    def control_tokens(self) -> list[str]:
        """Those of the form `<|…|>`, `<s>` and Qwen3's `<think>` in it, which a tokenizer must have.

        >>> CHAT_TEMPLATES["chatml"].control_tokens
        ['<|im_start|>', '<|im_end|>']
        """
        return list(dict.fromkeys(re.findall(r"<\|[^<>|]+\|>|<s>|</?think>", "".join(self.texts))))

    def exchange(self, question: str, answer: str) -> str:
        """One question and its answer, without `end`: text to train a tokenizer on.

        >>> ChatTemplate().exchange("What is this?", "A bus.")
        'USER: What is this? ASSISTANT: A bus.'
        """
        return f"{self.system}{self.user}{question}{self.assistant}{self.answer}{answer}"


_CHAT = "A chat between a curious user and an artificial intelligence assistant"
_HELPFUL = "The assistant gives helpful, detailed, and polite answers to the user's questions."
_WATCH = (
    "The assistant carefully watch the video and pay attention to the cause and sequence of events, the detail and "
    "movement of objects, and the action and pose of persons. Based on {} observations, give the answer that best "
    "addresses the question."
)


def _released(system: str = "", **more: Any) -> ChatTemplate:
    return ChatTemplate(system, with_system=f"{SYSTEM} {ChatTemplate.user}", **more)


def _of_tokens(user: str, assistant: str, end: str, with_system: str, **more: Any) -> ChatTemplate:
    """A family's, whose turns begin and end with control tokens."""
    return ChatTemplate(
        user=user, assistant=assistant, end=end, with_system=with_system + user, keeps_newlines=True,
        **{"answer": ""} | more,
    )  # fmt: skip


_CHATML = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"
_CHATML_SYSTEM = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
_LLAMA_3 = "<|start_header_id|>{}<|end_header_id|>\n\n"

# The first are worded exactly as in the released code, its mistakes included: checkpoints were trained on these texts.
# The others have the control tokens of families, without the system text that a checkpoint's own may have.
CHAT_TEMPLATES = {
    "voco_v1": _released(f"{_CHAT} of the image. {_HELPFUL} "),
    "voco_video": _released(f"{_CHAT} of the video. {_HELPFUL} "),
    "voco_video_events": _released(f"{_CHAT} of the video. {_WATCH.format('his')}\n "),
    "voco_video_helpful_events": _released(f"{_CHAT} of the video. {_HELPFUL} {_WATCH.format('the')} "),
    "llava_v1": _released(f"{_CHAT}. {_HELPFUL} "),
    "bare": _released(),
    "plain": ChatTemplate(plain=True),
    "chatml": _of_tokens(*_CHATML, _CHATML_SYSTEM),  # Qwen2, Qwen2.5, SmolLM2
    # Without thinking, as enable_thinking=False has it; every answer of a conversation, where Qwen3's own has the last
    "qwen3": _of_tokens(_CHATML[0], f"{_CHATML[1]}<think>\n\n</think>\n\n", _CHATML[2], _CHATML_SYSTEM),
    # LLaVA-Interleave and -OneVision; answers follow what the model is asked with, which their own has for the last
    "llava_qwen": _of_tokens(
        "<|im_start|>user ", "<|im_end|><|im_start|>assistant\n", "<|im_end|>",
        f"<|im_start|>system \n{SYSTEM}<|im_end|>", without_images="\n",
    ),
    "llama3": _of_tokens(
        _LLAMA_3.format("user"), f"<|eot_id|>{_LLAMA_3.format('assistant')}", "<|eot_id|>",
        f"<|begin_of_text|>{_LLAMA_3.format('system')}{SYSTEM}<|eot_id|>", system="<|begin_of_text|>",
    ),
    # Of version 3; a system text stands in the first question, as in version 1 (3's own has it in the last)
    "mistral": ChatTemplate(
        "<s>", "[INST] ", "[/INST]", with_system=f"<s>[INST] {SYSTEM}\n\n", keeps_newlines=True
    ),
}  # fmt: skip


def get_chat_template(name: str, custom: Mapping[str, Any] | None = None) -> ChatTemplate:
    """A template by name; `custom` are the texts of the ones named 'custom' and 'tokenizer'."""
    return ChatTemplate(**custom) if name in (CUSTOM, TOKENIZER) and custom is not None else CHAT_TEMPLATES[name]
