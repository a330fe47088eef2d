"""A small HTTP server for releases of an adapter; its parts are built in chapter 16.

    python -m rlora_lab serve releases --port 8000

A release is a folder with the adapter's two files and `release.json`, which holds their hashes, a
fingerprint of the base, and prompts with the answers to expect. The folder `releases` holds one
folder for each, and `current.json`, which says who is served: `{"stable": "v1", "candidate": "v2",
"share": 0.1}`. The server reads it anew for each request, and whoever replaces it whole has rolled
out or back.

The answers have the form of OpenAI's completions, as vLLM's have: `POST /v1/completions` with
`prompt`, and if wanted `max_tokens`, `model` (an adapter's name) and `request_id`. Decoding is
greedy. One worker runs requests that arrive close together as one padded batch.
"""

import asyncio
import re
import signal
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

import rlora_min  # noqa: F401  registers the tuner with PEFT

from ..chapters.ch16_shipping import Batcher, choose, fingerprint, generate, load_release
from ..errors import LabError
from ..models.bases import load_base
from ..tasks.strings import VOCABULARY, decode, encode
from .releases import FILES, RELEASE, read_current, replace_json, sha256


def write_release(
    folder: Path,
    base: str,
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    most: int = 16,
) -> None:
    """Seal an adapter where it was trained: from here on each of its bytes is known.

    Args:
        base: the fingerprint of the base, taken before the adapter was put into it.
        model: with the adapter, active and in evaluation.
        prompts: a few, whose answers of at most `most` tokens are kept to compare with.
    """
    answers = generate(model, tokenizer, [(tokenizer.encode(prompt), most) for prompt in prompts])
    canary = [
        [prompt, most, tokenizer.decode(new)] for prompt, new in zip(prompts, answers, strict=True)
    ]
    files = {name: sha256(folder / name) for name in FILES}
    replace_json(folder / RELEASE, {"base": base, "files": files, "canary": canary})


class Characters:
    """The characters of the tiny base, with the methods of transformers' tokenizers."""

    pad_token_id, eos_token_id = 0, None

    def encode(self, text: str) -> list[int]:
        """ValueError: a character that the base does not know."""
        if strange := sorted(set(text) - set(VOCABULARY)):
            raise ValueError(f"unknown characters {strange}; allowed are {VOCABULARY}")
        return encode(text).tolist()

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return decode(ids)


class Completion(BaseModel):
    """What may be asked. A field that would be ignored is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: str = Field(min_length=1)
    max_tokens: int = Field(16, ge=1)
    model: str | None = None
    request_id: str | None = Field(None, min_length=1, max_length=128)


def create_app(
    model: PeftModel,
    tokenizer: Any,
    folder: Path,
    *,
    window: float = 0.005,
    max_batch: int = 32,
    max_queue: int = 64,
    max_prompt: int | None = None,
    max_tokens: int | None = None,
    max_bytes: int = 65_536,
    timeout: float = 30.0,
    observe: Callable[[str, list], None] | None = None,
) -> FastAPI:
    """The server, for uvicorn or any other ASGI server; one process, one model, one worker.

    Args:
        model: its adapters are those that may be asked for.
        tokenizer: `encode`, `decode`, `pad_token_id`, `eos_token_id` as in transformers.
        folder: where `current.json` is.
        max_prompt, max_tokens: tokens; where None, half of the model's longest sequence each, and
            at most 1024.
        max_bytes: of a request's body.
        timeout: seconds until a request is given up.
        observe: called after each batch with the adapter and a list of (token ids, most new).

    Raises:
        LabError: `current.json` can't be read, or names an adapter that the model does not have.
    """
    model.eval()
    adapters = list(model.peft_config)
    state = {"current": read_current(folder, adapters), "fault": None}
    counts: Counter[str] = Counter()
    half = min(getattr(model.config, "max_position_embeddings", 2048) // 2, 1024)
    max_prompt, max_tokens = max_prompt or half, max_tokens or half

    def run(adapter: str, rows: list) -> list[list[int]]:
        model.set_adapter(adapter, inference_mode=True)
        counts[f'rlora_model_calls_total{{model="{adapter}"}}'] += 1
        answers = generate(model, tokenizer, rows)
        if observe is not None:
            try:
                observe(adapter, rows)
            except Exception:  # a monitor that fails must not take answers with it
                counts["rlora_observe_errors_total"] += 1
        return answers

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        state["batcher"] = Batcher(run, window, max_batch, max_queue)
        state["worker"] = asyncio.create_task(state["batcher"].work())
        yield  # uvicorn ends this only after the last request was answered
        state["worker"].cancel()
        with suppress(asyncio.CancelledError):
            await state["worker"]

    app = FastAPI(title="R-LoRA adapters", lifespan=lifespan, openapi_url=None)

    def current() -> dict:
        try:
            state["current"], state["fault"] = read_current(folder, adapters), None
        except LabError as error:  # the last good one stays in force, and /health says why
            state["fault"] = str(error)
        return state["current"]

    async def read(request: Request) -> tuple[Completion, list[int]]:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > max_bytes:
                raise HTTPException(413, f"The body is longer than {max_bytes} bytes.")
        try:
            asked = Completion.model_validate_json(body)
            ids = tokenizer.encode(asked.prompt)
        except ValidationError as error:
            why = error.errors(include_url=False, include_context=False, include_input=False)
            raise HTTPException(422, why) from None
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        for what, have, most in (
            ("prompt", len(ids), max_prompt),
            ("max_tokens", asked.max_tokens, max_tokens),
        ):
            if have > most:
                raise HTTPException(422, f"{what}: {have} tokens, allowed are {most}.")
        if asked.model not in (None, *adapters):
            raise HTTPException(404, f"No adapter {asked.model!r}; there are {adapters}.")
        return asked, ids

    @app.post("/v1/completions")
    async def completions(request: Request) -> dict:
        asked, ids = await read(request)
        request_id = asked.request_id or uuid.uuid4().hex
        adapter = request.state.adapter = asked.model or choose(request_id, current())
        try:
            async with asyncio.timeout(timeout):
                new = await state["batcher"].ask(adapter, (ids, asked.max_tokens))
        except asyncio.QueueFull:
            why = f"{max_queue} requests wait already; try again in a second."
            raise HTTPException(503, why, {"Retry-After": "1"}) from None
        except TimeoutError:
            raise HTTPException(504, f"No answer within {timeout:g} s.") from None
        except Exception as error:
            raise HTTPException(500, f"The model failed: {type(error).__name__}.") from error
        end = tokenizer.eos_token_id in new if tokenizer.eos_token_id is not None else False
        new = new[: new.index(tokenizer.eos_token_id)] if end else new
        text = tokenizer.decode(new, skip_special_tokens=True)
        choice = {"index": 0, "text": text, "finish_reason": "stop" if end else "length"}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(new)}
        return {"id": request_id, "model": adapter, "choices": [choice], "usage": usage}

    @app.middleware("http")
    async def count(request: Request, call_next):
        start = time.perf_counter()
        response = await call_next(request)
        if request.url.path == "/v1/completions":
            adapter = getattr(request.state, "adapter", "")
            labels = f'{{code="{response.status_code}",model="{adapter}"}}'
            counts[f"rlora_requests_total{labels}"] += 1
            counts[f"rlora_request_seconds_sum{labels}"] += time.perf_counter() - start
        return response

    @app.get("/health")
    async def health() -> JSONResponse:
        now, alive = current(), not state["worker"].done()
        status = "ok" if alive and not state["fault"] else "degraded"
        told = {"status": status, "current": now, "fault": state["fault"], "adapters": adapters}
        return JSONResponse(told, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        lines = [f"{name} {value:g}" for name, value in sorted(counts.items())]
        lines.append(f"rlora_queue_length {state['batcher'].queue.qsize()}")
        return PlainTextResponse("\n".join(lines) + "\n")

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in adapters]}

    return app


def serve(
    folder: Path,
    base: str = "tiny",
    host: str = "127.0.0.1",
    port: int = 8000,
    window_ms: float = 5,
    max_batch: int = 32,
    max_queue: int = 64,
    max_prompt: int | None = None,
    max_tokens: int | None = None,
    timeout: float = 30,
) -> None:
    """Check and load every release of a folder, and serve them until SIGTERM or Ctrl-C.

    Requests that were accepted are answered before it ends. The options are those of
    `python -m rlora_lab serve`.
    """
    loaded = load_base(base)
    model: nn.Module = loaded.model.requires_grad_(False)
    tokenizer, own = loaded.tokenizer or Characters(), fingerprint(model)
    for release in sorted(path.parent for path in folder.glob(f"*/{RELEASE}")):
        if not re.fullmatch(r"[\w-]+", release.name):
            raise LabError(f"{release.name!r} can't be an adapter's name: letters, digits, _ and -")
        model = load_release(model, release, own, tokenizer)
        print(f"{release.name}: checked and loaded", flush=True)
    if not isinstance(model, PeftModel):
        raise LabError(f"{folder.name} holds no release, which is a folder with a {RELEASE}")
    app = create_app(
        model,
        tokenizer,
        folder,
        window=window_ms / 1000,
        max_batch=max_batch,
        max_queue=max_queue,
        max_prompt=max_prompt,
        max_tokens=max_tokens,
        timeout=timeout,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # what uvicorn ends with, once it is done
    uvicorn.run(app, host=host, port=port, timeout_graceful_shutdown=int(timeout) + 1)
