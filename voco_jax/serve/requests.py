"""What a client may ask: the body of `POST /v1/chat/completions`, as OpenAI's API has it, and a few keys of our own.

Keys that change an answer and are not computed are errors, whichever values they have but those that ask for nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

TOP = 20  # the most likely tokens that may be asked for
# Keys of OpenAI's that change no answer here: who asks, how it is billed and kept
_IGNORED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "verbosity",
}  # fmt: skip
# Keys that are not computed, with the values that ask for nothing
_NOTHING: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "reasoning_effort": ("none",), "audio": (), "prediction": (), "web_search_options": (),
}  # fmt: skip


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Url(_Strict):
    """`detail` is a hint of OpenAI's, which changes nothing: all pictures are looked at alike."""

    url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] | None = None


class Text(_Strict):
    type: Literal["text"]
    text: str


class _ByReference(_Strict):
    uuid: str | None = Field(None, min_length=1, max_length=1000)


class ImageUrl(_ByReference):
    """A picture: `image_url`, whose memory gets the name `uuid`; or `uuid` alone, a memory that is there."""

    type: Literal["image_url"]
    image_url: Url | None = None


class VideoUrl(_ByReference):
    type: Literal["video_url"]
    video_url: Url | None = None


class VideoData(_Strict):
    """`data`: base64, or a data URI."""

    data: str = Field(min_length=1)
    format: str | None = None


class InputVideo(_ByReference):
    type: Literal["input_video"]
    input_video: VideoData | None = None


Part = Annotated[Text | ImageUrl | VideoUrl | InputVideo, Field(discriminator="type")]


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _what_answers_come_with(cls, value: Any) -> Any:
        """An answer of this API may be sent back as it came."""
        if isinstance(value, dict) and value.get("role") == "assistant":
            empty = ("refusal", "audio", "annotations", "tool_calls", "function_call", "reasoning_content")
            return {key: x for key, x in value.items() if key not in empty or x}
        return value


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class ChatRequest(_Strict):
    """Keys that are not OpenAI's: `tokens`, how many of each image's tokens are read, or "auto"; `top_k`, how many of
    the most likely tokens are drawn from, 0 for all (as in others' servers)."""

    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    seed: int | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    n: int = Field(1, ge=1, le=128)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=TOP)
    tokens: int | Literal["auto"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _keys(cls, value: Any) -> Any:
        """Without the keys that change nothing."""
        if not isinstance(value, dict):
            return value
        kept = {}
        for key, x in value.items():
            if x is None and key in ("n", "stream"):  # OpenAI's schema has null for the default
                continue
            if key in _IGNORED or (key in _NOTHING and (x is None or x in _NOTHING[key])):
                continue
            if key in _NOTHING:
                raise ValueError(f"{key}: not supported by this server; leave it out")
            kept[key] = x
        return kept

    @field_validator("temperature", "top_p", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
            return float(value)
        return value

    @field_validator("stop")
    @classmethod
    def _stop(cls, value: str | list[str] | None) -> str | list[str] | None:
        several = [value] if isinstance(value, str) else value or []
        if len(several) > 16 or not all(several) or any(len(text) > 1000 for text in several):
            raise ValueError("expected at most 16 texts of 1 to 1000 characters")
        return value

    @model_validator(mode="after")
    def _together(self) -> "ChatRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: expected stream with it")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: expected logprobs with it")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens, max_completion_tokens: expected one of them")
        return self

    @property
    def until(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class MemoryRequest(_Strict):
    """The body of `POST /v1/memories` that is not an upload: a picture or clip by its URL."""

    url: str = Field(min_length=1)
    name: str | None = Field(None, min_length=1, max_length=1000)
