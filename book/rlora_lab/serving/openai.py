"""Requests and answers in the form of OpenAI's API, as far as greedy decoding goes.

A field that would be ignored is an error: better no answer than another one than was asked for.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

CURRENT_MODEL = "current"  # the name of whoever the pointer file says

# What clients send along, and the one value at which greedy decoding does what they ask for.
NEUTRAL = {
    "temperature": 0,
    "top_p": 1,
    "n": 1,
    "best_of": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logprobs": False,
    "echo": False,
}


@dataclass
class Refused(Exception):
    """A request that is not answered: an HTTP status, and why."""

    status: int
    why: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str
    name: str | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class Asked(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str = CURRENT_MODEL
    max_tokens: int = Field(16, ge=1)
    stop: list[str] = Field([], max_length=4)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = Field(None, min_length=1, max_length=128)
    """Who asks: the same user is always answered by the same adapter."""
    seed: int | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, stop: list[str]) -> list[str]:
        if "" in stop:
            raise ValueError("an empty text stops everything")
        return stop


class Completion(Asked):
    """`POST /v1/completions`."""

    prompt: str = Field(min_length=1)


class Chat(Asked):
    """`POST /v1/chat/completions`."""

    model_config = ConfigDict(populate_by_name=True)
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, alias="max_completion_tokens")
    """As many as the server allows, where None."""


def read(form: type[Asked], body: bytes) -> Asked:
    """A request. Refused with 400: it is not of the form, or asks for what can't be had."""
    try:
        asked = json.loads(body)
        if isinstance(asked, dict):
            asked = {name: value for name, value in asked.items() if value is not None}
            for name in NEUTRAL.keys() & asked.keys():
                value = asked.pop(name)
                if value != NEUTRAL[name]:
                    why = f"decoding is greedy, so only {json.dumps(NEUTRAL[name])} is taken"
                    raise Refused(400, f"{name}: {why}, and no {value!r}.")
        return form.model_validate_json(json.dumps(asked))
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        said = [f"{'.'.join(map(str, one['loc'])) or 'body'}: {one['msg']}" for one in found]
        raise Refused(400, "; ".join(said)) from None
    except ValueError as error:
        raise Refused(400, f"not JSON: {error}") from None


def answer(asked: Asked, request_id: str, adapter: str, said: dict) -> dict:
    """The answer's form.

    Args:
        said: `text`, `finish_reason`, `prompt_tokens` and `completion_tokens`.
    """
    chat = isinstance(asked, Chat)
    usage = {name: said[name] for name in ("prompt_tokens", "completion_tokens")}
    choice = {"index": 0, "finish_reason": said["finish_reason"], "logprobs": None}
    if chat:
        choice["message"] = {"role": "assistant", "content": said["text"]}
    else:
        choice["text"] = said["text"]
    return {
        "id": request_id,
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": adapter,
        "choices": [choice],
        "usage": usage | {"total_tokens": sum(usage.values())},
    }


def events(asked: Asked, answer: dict) -> Iterator[str]:
    """The same as server-sent events: the text whole in one, as it is made in one batch."""
    choice, usage = answer["choices"][0], answer["usage"]
    head = {name: answer[name] for name in ("id", "object", "created", "model")}
    if isinstance(asked, Chat):
        head["object"] = "chat.completion.chunk"
        choice = choice | {"delta": choice["message"]}
        del choice["message"]
    chunks = [head | {"choices": [choice]}]
    if asked.stream_options.include_usage:
        chunks.append(head | {"choices": [], "usage": usage})
    for chunk in chunks:
        yield f"data: {json.dumps(chunk)}\n\n"
    yield "data: [DONE]\n\n"
