"""What stands before the adapters, as a Ray Serve deployment: HTTP, and the roll-out by share."""

import asyncio
import time
import uuid
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from ..chapters.ch16b_serving import choose
from ..errors import LabError
from .openai import CURRENT_MODEL, Asked, Chat, Completion, Refused, answer, events, read
from .releases import names_of, read_current

MOST_BYTES = 65_536  # of a request's body
QUIET = 1.0  # seconds without a request, after which the server may end
TRIES = 3  # a request whose replica dies is asked again: greedy, so the answer is the same

http = FastAPI(title="R-LoRA adapters", openapi_url=None)


@http.exception_handler(Refused)
async def refused(request: Request, error: Refused) -> JSONResponse:
    about = {"message": error.why, "type": "invalid_request_error", "code": error.status}
    again = {"Retry-After": "1"} if error.status == 503 else {}
    return JSONResponse({"error": about}, error.status, again)


@serve.deployment(name="front", max_ongoing_requests=1000)
@serve.ingress(http)
class Front:
    """Reads requests, chooses who answers, and asks again where a replica was lost."""

    def __init__(
        self, folder: str, timeout: float, stable: DeploymentHandle, candidate: DeploymentHandle
    ) -> None:
        self.folder, self.timeout = Path(folder), timeout
        self.stable, self.candidate = stable, candidate
        self.current = read_current(self.folder, names_of(self.folder))
        self.fault: str | None = None
        self.waiting, self.closing, self.last = 0, False, 0.0

    def _read_current(self) -> dict:
        try:
            self.current = read_current(self.folder, names_of(self.folder))
            self.fault = None
        except LabError as error:  # the last good one stays in force, and /health says why
            self.fault = str(error)
        return self.current

    @http.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        return await self._reply(Completion, request)

    @http.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Response:
        return await self._reply(Chat, request)

    async def _reply(self, form: type[Asked], request: Request) -> Response:
        self.last = time.monotonic()
        if self.closing:
            raise Refused(503, "The server is being stopped.")
        self.waiting += 1
        try:
            asked = read(form, await self._body(request))
            request_id = uuid.uuid4().hex
            adapter = self._adapter(asked, request_id)
            said = answer(asked, request_id, adapter, await self._ask(adapter, asked))
        finally:
            self.waiting -= 1
        if asked.stream:
            return StreamingResponse(events(asked, said), media_type="text/event-stream")
        return JSONResponse(said)

    async def _body(self, request: Request) -> bytes:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                raise Refused(413, f"The body is longer than {MOST_BYTES} bytes.")
        return body

    def _adapter(self, asked: Asked, request_id: str) -> str:
        if asked.model == CURRENT_MODEL:
            return choose(asked.user or request_id, self._read_current())
        there = names_of(self.folder)
        if asked.model not in there:
            raise Refused(404, f"No model {asked.model!r}; there are {[CURRENT_MODEL, *there]}.")
        return asked.model

    async def _ask(self, adapter: str, asked: Asked) -> dict:
        side = self.candidate if adapter == self.current["candidate"] else self.stable
        handle = side.options(method_name="answer", multiplexed_model_id=adapter)
        try:
            async with asyncio.timeout(self.timeout):
                for left in reversed(range(TRIES)):
                    try:
                        said = await handle.remote(asked)
                        break
                    except RayActorError:
                        if not left:
                            raise
        except BackPressureError:
            raise Refused(503, "Too many requests wait already; try again in a second.") from None
        except TimeoutError:
            raise Refused(504, f"No answer within {self.timeout:g} s.") from None
        except Exception as error:
            raise Refused(500, f"The model failed: {type(error).__name__}.") from error
        if isinstance(said, Refused):
            raise said
        return said

    @http.get("/health")
    async def health(self) -> dict:
        current = self._read_current()
        status = "degraded" if self.fault else "ok"
        return {"status": status, "current": current, "fault": self.fault}

    @http.get("/v1/models")
    async def models(self) -> dict:
        names = [CURRENT_MODEL, *names_of(self.folder)]
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in names]}

    async def check(self, name: str) -> str | None:
        """Load a release; why it is refused, if it is."""
        handle = self.stable.options(method_name="check", multiplexed_model_id=name)
        return await handle.remote(name)

    async def close(self) -> None:
        """Answer what was taken, refuse what still comes in, and return when it is quiet."""
        self.closing = True
        end = time.monotonic() + self.timeout
        while time.monotonic() < end:
            if not self.waiting and time.monotonic() > self.last + QUIET:
                return
            await asyncio.sleep(0.05)
