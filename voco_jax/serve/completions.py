"""Answers as OpenAI's API has them: `chat.completion` objects, and the events of a stream."""

from collections.abc import AsyncGenerator, Callable
import contextlib
import json
import secrets
import time
from typing import Any

from voco_jax.infer.engine import Engine
from voco_jax.serve.answer import Token, Update
from voco_jax.serve.errors import ApiError
from voco_jax.serve.requests import ChatRequest
from voco_jax.serve.service import Prepared

_FINISH = {"stop": "stop", "length": "length"}


def error_of(update: Update) -> ApiError | None:
    """The error that an answer ended with, if it did."""
    if update.finish == "deadline":
        return too_late()
    if update.finish in ("error", "cancelled"):
        return ApiError(503 if "stopped" in update.error else 500, update.error or "the request was cancelled")
    return None


def too_late() -> ApiError:
    """The client need not try again: it would take as long."""
    message = "the answer took longer than the server allows"
    return ApiError(504, message, code="timeout", headers={"x-should-retry": "false"})


class Completion:
    """Builds what is sent of one request's answers."""

    def __init__(self, request: ChatRequest, prepared: Prepared, engine: Engine, model: str, fingerprint: str):
        self._request, self._prepared, self._engine = request, prepared, engine
        self._top = request.top_logprobs or 0
        self._completion_tokens = 0
        self._read_with: int | None = None  # tokens of each image, where that was chosen
        self._first = {
            "id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model,
            "system_fingerprint": fingerprint,
        }  # fmt: skip

    def add(self, update: Update) -> None:
        """Count an update's tokens, the one that ended it too."""
        self._completion_tokens += len(update.log_probabilities)
        self._read_with = update.read_with or self._read_with

    def usage(self) -> dict:
        prompt, completion = self._prepared.prompt_tokens, self._completion_tokens
        cached, whole = self._prepared.cached_tokens, self._prepared.asks[0]
        if self._read_with is not None:
            prompt = len(whole.sample.first_tokens(whole.tokens, self._read_with))
            cached = cached * self._read_with // whole.tokens
        return {
            "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }  # fmt: skip

    def whole(self, choices: dict[int, list[Update]]) -> dict:
        """The object of a request that is not streamed."""
        found = []
        for i, updates in sorted(choices.items()):
            tokens = [token for update in updates for token in update.tokens]
            choice: dict[str, Any] = {
                "index": i, "message": {
                    "role": "assistant", "content": "".join(update.text for update in updates), "refusal": None
                },
                "logprobs": self._logprobs(tokens), "finish_reason": _FINISH[updates[-1].finish],
            }  # fmt: skip
            found.append(choice | _read_with(updates[-1]))
        return {**self._first, "object": "chat.completion", "choices": found, "usage": self.usage()}

    def chunk(self, i: int, update: Update, *, is_first: bool) -> dict:
        """An event of a stream."""
        delta: dict[str, Any] = {"role": "assistant"} if is_first else {}
        if update.text or is_first:
            delta["content"] = update.text
        choice = {
            "index": i, "delta": delta, "logprobs": self._logprobs(update.tokens) if update.tokens else None,
            "finish_reason": _FINISH.get(update.finish),
        }  # fmt: skip
        return self._chunk([choice | _read_with(update)])

    def _chunk(self, choices: list[dict], usage: dict | None = None) -> dict:
        chunk = {**self._first, "object": "chat.completion.chunk", "choices": choices}
        options = self._request.stream_options
        return chunk | {"usage": usage} if options is not None and options.include_usage else chunk

    async def events(
        self, updates: AsyncGenerator[tuple[int, Update]], told: Callable[[Exception], ApiError]
    ) -> AsyncGenerator[str]:  # fmt: skip
        """Server-sent events of all that comes; an error after the first is an event too, as `told`."""
        begun: set[int] = set()
        try:
            async with contextlib.aclosing(updates):
                async for i, update in updates:
                    self.add(update)
                    if (error := error_of(update)) is not None:
                        yield _event(error.body)
                        return
                    yield _event(self.chunk(i, update, is_first=i not in begun))
                    begun.add(i)
        except Exception as error:
            yield _event(told(error).body)
            return
        options = self._request.stream_options
        if options is not None and options.include_usage:
            yield _event(self._chunk([], self.usage()))
        yield "data: [DONE]\n\n"

    def _logprobs(self, tokens) -> dict | None:
        if not self._request.logprobs:
            return None
        return {"content": [self._token(token) for token in tokens], "refusal": None}

    def _token(self, token: Token) -> dict:
        top = [self._one(i, sure) for i, sure in token.top[: self._top]]
        return self._one(token.id, token.log_probability) | {"top_logprobs": top}

    def _one(self, i: int, log_probability: float) -> dict:
        text, of_text = self._engine.token(i)
        return {"token": text, "logprob": log_probability, "bytes": None if of_text is None else list(of_text)}


def _read_with(update: Update) -> dict:
    """Ours: how many tokens of each image an answer of `tokens: "auto"` was read with."""
    return {} if update.read_with is None else {"tokens": update.read_with}


def _event(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
