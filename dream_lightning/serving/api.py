"""OpenAI's endpoints as a LitSpec: JSON and server-sent events, limits, timeouts, cancellation, metrics, a web page."""

import asyncio
import html
import itertools
import json
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from importlib import resources
from string import Template
from typing import Any

import fastapi
import prometheus_client as prometheus
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from litserve.specs.base import LitSpec
from litserve.utils import ResponseBufferItem
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from dream_lightning.errors import UserError
from dream_lightning.sampling import SamplingParams
from dream_lightning.serving.engine import Event
from dream_lightning.serving.requests import Request

CHAT_PATH = "/v1/chat/completions"
_POLL = 0.25  # seconds between two looks whether the client is still there
_KINDS = {401: "authentication_error", 429: "rate_limit_error", 504: "timeout_error"}  # of OpenAI's errors


class Endpoints(LitSpec):
    """The endpoints.

    Args:
        name: of the model.
        defaults: sampling where a request says nothing.
        most_rows: answers that may run or wait at a time; more are refused.
        timeout: seconds until a request is given up.
        cancelled: flags shared with the workers; request n has flag n modulo their number.
        history: take earlier messages; without, a chat with an answer in it is refused.
    """

    def __init__(
        self, name: str, defaults: SamplingParams, most_rows: int, timeout: float, cancelled: Any, history: bool
    ) -> None:
        super().__init__()
        self.api_path = CHAT_PATH  # by which LitServe finds the queue
        self.name, self.defaults, self.most_rows, self.timeout = name, defaults, most_rows, timeout
        self.cancelled, self.history, self._numbers, self._rows = cancelled, history, itertools.count(), 0
        self.registry = prometheus.CollectorRegistry()
        of, buckets = {"registry": self.registry}, (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
        self.requests = prometheus.Counter("dream_requests", "By status; 499: the client has left", ["status"], **of)
        self.tokens = prometheus.Counter("dream_tokens", "Read (prompt) and written (completion)", ["kind"], **of)
        self.rows = prometheus.Gauge("dream_rows", "Answers that wait or are being denoised", ["state"], **of)
        seconds = ("dream_seconds", "From a request to its first block, and to its end", ["until"])
        self.seconds = prometheus.Histogram(*seconds, buckets=buckets, **of)

    def __getstate__(self) -> dict[str, Any]:  # all that the workers need of it
        return {name: getattr(self, name) for name in ("api_path", "defaults", "cancelled")}

    @property
    def stream(self) -> bool:
        return True

    def pre_setup(self, lit_api: Any) -> None:
        self.add_endpoint(CHAT_PATH, self.answer, ["POST"])
        self.add_endpoint("/v1/completions", self.answer, ["POST"])
        self.add_endpoint("/v1/models", self.models, ["GET"])
        self.add_endpoint("/metrics", self.metrics, ["GET"])
        self.add_endpoint("/", self.page, ["GET"])

    async def models(self) -> Response:
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "dream_lightning"}
        return JSONResponse({"object": "list", "data": [model]})

    async def metrics(self) -> Response:
        return Response(prometheus.generate_latest(self.registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    async def page(self) -> Response:
        """The chat, in the look of the denoising page."""
        files = resources.files("dream_lightning")
        look = files.joinpath("viewer/page.html").read_text("utf-8").partition("<style>")[2].partition("</style>")[0]
        page = files.joinpath("serving/chat.html").read_text("utf-8")
        values = {"look": look, "name": html.escape(self.name), "history": json.dumps(self.history)}
        return HTMLResponse(Template(page).substitute(values))

    async def failed(self, request: fastapi.Request, error: HTTPException) -> Response:
        """Any error as OpenAI's clients read it."""
        self.requests.labels(error.status_code).inc()
        return JSONResponse(_error(error), error.status_code, error.headers)

    async def answer(self, request: fastapi.Request) -> Response:
        is_chat = request.url.path == CHAT_PATH
        try:
            asked = Request.model_validate_json(await request.body())
            params = asked.params(self.defaults)
            if not self.history and any(m.role == "assistant" for m in asked.messages or ()):
                raise UserError(
                    "messages has an earlier answer, and this model was trained on single questions: send the last "
                    "question alone, or start serve with --history true"
                )
        except ValidationError as error:
            wrong = error.errors()[0]
            where = ".".join(map(str, wrong["loc"])) or "the body"
            raise HTTPException(400, f"{where} is {wrong['input']!r:.80}: {wrong['msg']}") from error
        except UserError as error:
            raise HTTPException(400, str(error)) from error
        if is_chat != bool(asked.messages) or is_chat == bool(asked.prompt):
            raise HTTPException(400, f"this endpoint takes {'messages' if is_chat else 'a prompt'}, and not the other")
        if asked.model not in (None, self.name):
            raise HTTPException(404, f"model is {asked.model!r:.80}, this server has {self.name}: set model to it")
        if self._rows + asked.answers > self.most_rows:
            told = (
                f"{self._rows} answers run or wait, {asked.answers} are asked, at most {self.most_rows} can: try later"
            )
            raise HTTPException(429, told, {"Retry-After": "1"})
        events, writer = self._events(request, asked, params), _Writer(asked, self.name, is_chat)
        if asked.stream:
            first = await anext(events)  # an error before it has a status of its own
            return StreamingResponse(self._stream(writer, first, events), media_type="text/event-stream")
        async for event in events:
            writer.chunk(event)
        return JSONResponse(writer.whole())

    async def _stream(self, writer: "_Writer", first: Event, events: AsyncIterator[Event]) -> AsyncIterator[str]:
        try:
            async with aclosing(events):
                yield _line(writer.chunk(first))
                async for event in events:
                    yield _line(writer.chunk(event))
        except HTTPException as error:  # the status was sent long ago
            self.requests.labels(error.status_code).inc()
            yield _line(_error(error))
        else:
            if (options := writer.asked.stream_options) and options.include_usage:
                yield _line(writer.head | {"choices": [], "usage": writer.usage})
            yield "data: [DONE]\n\n"

    async def _events(self, request: fastapi.Request, asked: Request, params: SamplingParams) -> AsyncIterator[Event]:
        """What the worker reports; HTTPException for its errors, a timeout, or a client that has left."""
        uid, slot, start = str(uuid.uuid4()), next(self._numbers) % len(self.cancelled), time.monotonic()
        item = self.response_buffer[uid] = ResponseBufferItem(asyncio.Event(), deque())
        waiting, running = self.rows.labels("waiting"), self.rows.labels("running")
        joined, left, blocks, looked = 0, asked.answers, 0, start
        self.cancelled[slot], self._rows = 0, self._rows + left
        waiting.inc(left)
        try:
            self.request_queue.put((self.response_queue_id, uid, start, (slot, asked, params)))
            while left:
                with suppress(TimeoutError):
                    await asyncio.wait_for(item.event.wait(), _POLL)
                if time.monotonic() - looked > _POLL:
                    looked = time.monotonic()
                    if await request.is_disconnected():
                        raise HTTPException(499, "the client has left")
                if time.monotonic() - start > self.timeout:
                    raise HTTPException(504, f"no answer within {self.timeout:g} s: ask for fewer tokens, or later")
                item.event.clear()
                while item.response_queue:
                    event = item.response_queue.popleft()[0] or {"error": "the worker has died", "status": 503}
                    if "error" in event:
                        raise HTTPException(event.get("status", 500), event["error"])
                    if "prompt_tokens" in event:
                        joined += 1
                        waiting.dec()
                        running.inc()
                        self.tokens.labels("prompt").inc(event["prompt_tokens"])
                    if "text" in event and (blocks := blocks + 1) == 1:
                        self.seconds.labels("first block").observe(time.monotonic() - start)
                    if "finish" in event:
                        left -= 1
                        self.tokens.labels("completion").inc(event["tokens"])
                    yield event
            self.seconds.labels("end").observe(time.monotonic() - start)
            self.requests.labels(200).inc()
        except (asyncio.CancelledError, GeneratorExit):  # the client of a stream has left
            self.requests.labels(499).inc()
            raise
        finally:
            self.cancelled[slot], self._rows = left > 0, self._rows - asked.answers
            waiting.dec(asked.answers - joined)
            running.dec(joined)
            del self.response_buffer[uid]


class _Writer:
    """Events → OpenAI's JSON."""

    def __init__(self, asked: Request, model: str, is_chat: bool) -> None:
        self.asked, self.is_chat = asked, is_chat
        self.head = {"id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time())}
        kind = "text_completion" if not is_chat else f"chat.completion{'.chunk' * asked.stream}"
        self.head |= {"object": kind, "model": model, "seed": asked.seed}
        self.texts, self.reasons = [""] * asked.answers, [None] * asked.answers
        self.usage = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens", "forwards"), 0)

    def chunk(self, event: Event) -> dict[str, Any]:
        """The event as a part of a stream; it also becomes a part of the whole."""
        index, text = event["index"], event.get("text", "")
        self.texts[index] += text
        self.reasons[index] = event.get("finish")
        self.usage["prompt_tokens"] += event.get("prompt_tokens", 0) * (index % self.asked.n == 0)
        self.usage["completion_tokens"] += event.get("tokens", 0)
        self.usage["forwards"] += event.get("forwards", 0)
        self.usage["total_tokens"] = self.usage["prompt_tokens"] + self.usage["completion_tokens"]
        delta = {"content": text} | ({"role": "assistant"} if "prompt_tokens" in event else {})
        choice = {"index": index, "logprobs": None, "finish_reason": event.get("finish")}
        choice |= {"delta": delta} if self.is_chat else {"text": text}
        canvas = {"canvas": {"index": index, "changes": event["changes"]}} if "changes" in event else {}
        return self.head | {"choices": [choice]} | canvas

    def whole(self) -> dict[str, Any]:
        choices = []
        for index, (text, reason) in enumerate(zip(self.texts, self.reasons, strict=True)):
            content = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
            choices.append({"index": index, "logprobs": None, "finish_reason": reason, **content})
        return self.head | {"choices": choices, "usage": self.usage}


def _line(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _error(error: HTTPException) -> dict[str, Any]:
    kind = _KINDS.get(error.status_code, "invalid_request_error" if error.status_code < 500 else "server_error")
    return {"error": {"message": error.detail, "type": kind, "param": None, "code": str(error.status_code)}}
