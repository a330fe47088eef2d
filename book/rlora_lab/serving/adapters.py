"""A base with releases of adapters on it, as a Ray Serve deployment: one replica, one model.

Ray Serve batches what waits together, loads an adapter when somebody asks for it, and starts and
replaces replicas; here stands only what to do with one batch.
"""

import asyncio
import json
import logging
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.util.metrics import Gauge

import rlora_min  # noqa: F401  registers the tuner with PEFT

from ..chapters.ch16_shipping import (
    distance,
    ends_of,
    fingerprint,
    generate,
    load_release,
    routing_of,
)
from ..errors import LabError
from ..models.answers import has_bf16
from ..models.bases import load_base
from ..tasks.characters import Characters
from .openai import Asked, Chat, Refused
from .releases import RELEASE

MOST_ADAPTERS = 8  # on one replica; the one that was not asked for longest makes room
WINDOW = 100  # requests, over which routing is compared with that of the calibration
LOG = logging.getLogger("ray.serve")


class Settings(BaseModel):
    """What the server is told; `args` in serve.yaml."""

    model_config = ConfigDict(extra="forbid")
    folder: str
    base: str = "tiny"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    window_ms: float = Field(5, ge=0)
    max_batch: int = Field(32, ge=1)
    max_prompt: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    max_time: float = Field(10, gt=0)
    timeout: float = Field(30, gt=0)
    threads: int | None = Field(None, ge=1)


def _dtype(name: str) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if has_bf16() else torch.float32
    return getattr(torch, name)


@serve.deployment(name="stable", max_ongoing_requests=64, max_queued_requests=64)
class Adapters:
    """Answers requests by the adapter that their handle names."""

    def __init__(self, settings: Settings) -> None:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.settings, self.folder = settings, Path(settings.folder)
        base = load_base(settings.base)
        self.tokenizer = base.tokenizer or Characters()
        self.base = fingerprint(base.model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = base.model.requires_grad_(False).to(device, _dtype(settings.dtype))
        half = min(getattr(self.model.config, "max_position_embeddings", 2048) // 2, 1024)
        self.max_prompt = settings.max_prompt or half
        self.max_tokens = settings.max_tokens or half
        self.worker = ThreadPoolExecutor(1)  # one model, so one thread
        self.calibration: dict[str, list | None] = {}  # mean routing weights, (layers, N)
        self.seen: dict[str, deque] = defaultdict(lambda: deque(maxlen=WINDOW))
        self.moved = Gauge(
            "rlora_routing_distance",
            "share of the routing weight that moved since the calibration",
            tag_keys=("adapter",),
        )
        self.batch.set_max_batch_size(settings.max_batch)
        self.batch.set_batch_wait_timeout_s(settings.window_ms / 1000)

    async def answer(self, asked: Asked) -> dict | Refused:
        """Text, reason and counts; Refused, where the request is too long or can't be asked."""
        try:
            ids = self._tokens(asked)
        except ValueError as error:
            return Refused(400, str(error))
        if len(ids) > self.max_prompt:
            return Refused(413, f"prompt: {len(ids)} tokens, allowed are {self.max_prompt}.")
        most = asked.max_tokens or self.max_tokens
        if most > self.max_tokens:
            return Refused(400, f"max_tokens: {most}, allowed are {self.max_tokens}.")
        why = await self.check(serve.get_multiplexed_model_id())
        if why is not None:
            return Refused(500, why)
        return await self.batch((ids, most, asked.stop))

    async def check(self, name: str) -> str | None:
        """Load a release, if it is not; why it is refused, if it is."""
        try:
            await self.load(name)
        except LabError as error:
            return str(error)
        return None

    def _tokens(self, asked: Asked) -> list[int]:
        if not isinstance(asked, Chat):
            return self.tokenizer.encode(asked.prompt)
        if not self.tokenizer.chat_template:
            raise ValueError("this base has no chat template; ask /v1/completions")
        messages = [{"role": one.role, "content": one.content} for one in asked.messages]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer.encode(text, add_special_tokens=False)

    @serve.multiplexed(max_num_models_per_replica=MOST_ADAPTERS)
    async def load(self, name: str) -> "_Loaded":
        """Ray Serve calls it when an adapter is first asked for. LabError: it is refused."""
        await self._in_worker(self._load, name)
        return _Loaded(partial(self.worker.submit, self._drop, name))

    def _load(self, name: str) -> None:
        self.model = load_release(self.model, self.folder / name, self.base, self.tokenizer)
        release = json.loads((self.folder / name / RELEASE).read_text())
        self.calibration[name] = release.get("routing")

    def _drop(self, name: str) -> None:
        if name in self.model.peft_config:
            self.model.delete_adapter(name)

    @serve.batch(max_concurrent_batches=1)
    async def batch(self, rows: list[tuple[list[int], int, list[str]]]) -> list[dict]:
        """Ray Serve calls it with requests that wait together and ask for the same adapter."""
        return await self._in_worker(self._answer_all, serve.get_multiplexed_model_id(), rows)

    def _answer_all(self, name: str, rows: list[tuple[list[int], int, list[str]]]) -> list[dict]:
        if name not in self.model.peft_config:  # it had to make room while these waited
            self._load(name)
        self.model.set_adapter(name, inference_mode=True)
        asked = [(ids, most) for ids, most, _ in rows]
        stops = [stop for _, _, stop in rows]
        found = generate(self.model, self.tokenizer, asked, stops, self.settings.max_time)
        try:
            self._watch(name, [ids for ids, _, _ in rows])
        except Exception:  # what watches must not take answers with it
            LOG.exception("the routing of %s can't be watched", name)
        return [self._said(row, new) for row, new in zip(rows, found, strict=True)]

    def _said(self, row: tuple[list[int], int, list[str]], new: list[int]) -> dict:
        ids, _, stop = row
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        found = [text.index(end) for end in stop if end in text]
        if found:
            text = text[: min(found)]
        ended = found or (new and new[-1] in ends_of(self.model))
        return {
            "text": text,
            "finish_reason": "stop" if ended else "length",
            "prompt_tokens": len(ids),
            "completion_tokens": len(new),
        }

    def _watch(self, name: str, prompts: list[list[int]]) -> None:
        """How far the routing has moved, where the release says how it was."""
        calibration = self.calibration[name]
        if calibration is None:
            return
        self.seen[name].extend(routing_of(self.model, prompts, name).cpu())
        window = torch.stack(list(self.seen[name]))
        self.moved.set(distance(window, torch.tensor([calibration])), {"adapter": name})

    async def _in_worker(self, what: Callable, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.worker, what, *args)


class _Loaded:
    """What Ray Serve drops when an adapter has to make room."""

    def __init__(self, drop: Callable) -> None:
        self.drop = drop

    def __del__(self) -> None:
        self.drop()
