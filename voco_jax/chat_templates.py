"""Chat templates as data: the text around a conversation's turns. Training, questions, chat and tools all use these.

A prompt is `system`, then for each turn of the user `user`, what is said, `assistant`, and for each answer `answer`,
what is said, `end`. `end` begins with the token that stops generation. No tokenizer and no model is imported here.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

EOS = "{eos}"  # in a template: the tokenizer's end-of-sequence token
CUSTOM = "custom"  # the template of `config.data.custom_template`


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
    plain: bool = False

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts in which control tokens may stand."""
        return self.system, self.user, self.assistant, self.answer, self.end

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

# Worded exactly as in the released code, its mistakes included: checkpoints were trained on these texts.
CHAT_TEMPLATES = {
    "voco_v1": ChatTemplate(f"{_CHAT} of the image. {_HELPFUL} "),
    "voco_video": ChatTemplate(f"{_CHAT} of the video. {_HELPFUL} "),
    "voco_video_events": ChatTemplate(f"{_CHAT} of the video. {_WATCH.format('his')}\n "),
    "voco_video_helpful_events": ChatTemplate(f"{_CHAT} of the video. {_HELPFUL} {_WATCH.format('the')} "),
    "llava_v1": ChatTemplate(f"{_CHAT}. {_HELPFUL} "),
    "bare": ChatTemplate(),
    "plain": ChatTemplate(plain=True),
}


def get_chat_template(name: str, custom: Mapping[str, Any] | None = None) -> ChatTemplate:
    """A template by name; `custom` are the texts of the one named 'custom'."""
    return ChatTemplate(**custom) if name == CUSTOM and custom is not None else CHAT_TEMPLATES[name]
