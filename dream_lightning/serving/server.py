"""LitServe around the engine: one process answers HTTP; every worker has the model and an engine of its own."""

import os
import signal
import sys
from multiprocessing import get_context, parent_process
from pathlib import Path
from secrets import compare_digest
from typing import Any, Literal

import fastapi
import litserve as ls
from litserve.loops.base import LitLoop
from litserve.utils import LitAPIStatus, LoopResponseType
from starlette.exceptions import HTTPException

from dream_lightning.errors import UserError, check_range
from dream_lightning.locate import Trained, trained
from dream_lightning.sampling import SamplingParams
from dream_lightning.serving.api import Endpoints
from dream_lightning.serving.engine import Engine, Event, Row
from dream_lightning.serving.requests import Request
from dream_lightning.viewer.commands import open_model

DEFAULTS = SamplingParams(
    **{"max_new_tokens": 256, "steps": 256, "alg": "maskgit_plus", "threshold": 0.9, "forbid_mask": True},
    **{"block_length": 32, "cache": "dual", "stop_at_eos": True},
)
KEY = "DREAM_API_KEY"  # environment variable: an option would show in the list of processes
_OPEN = ("/", "/health")  # need no key
_FLAGS = 1 << 16  # far more than requests that run or wait at a time
_LARGEST = 1 << 20  # bytes of a request, whose encoding takes at most a second


class EngineLoop(LitLoop):
    """What a worker repeats: take requests that have room, do one turn, send what happened."""

    freed = False  # the last turn ended answers, whose clients may ask again at once

    def run(
        self, lit_api: "DreamAPI", device: str, worker_id: int, request_queue: Any, transport: Any, *_: Any
    ) -> None:
        engine = lit_api.engine
        wait = lit_api.batch_timeout * self.freed if engine.active or engine.waiting else 1.0
        while engine.room > 0 and (taken := self.get_request(request_queue, block=wait > 0, timeout=wait or None)):
            queue_id, uid, _, (slot, asked, params) = taken
            try:
                engine.waiting += lit_api.decode_request(asked, params=params, owner=(queue_id, uid, slot))
            except UserError as error:
                self._send(transport, queue_id, uid, {"error": str(error), "status": 400})
            wait = lit_api.batch_timeout
        self.freed = False
        for row, event in engine.turn():
            self.freed |= "finish" in event
            self._send(transport, *row.owner[:2], event | {"index": row.index})

    def _send(self, transport: Any, queue_id: int, uid: str, event: Event) -> None:
        self.put_response(transport, queue_id, uid, event, LitAPIStatus.OK, LoopResponseType.STREAMING)


class DreamAPI(ls.LitAPI):
    """The model in a worker; the arguments are those of `make_server`."""

    def __init__(
        self,
        opened: dict[str, Any],
        how: Trained,
        max_length: int,
        warm_up_length: int,
        endpoints: Endpoints,
        **options: Any,
    ) -> None:
        super().__init__(spec=endpoints, loop=EngineLoop(), **options)
        self.opened, self.how, self.key = opened, how, os.environ.get(KEY)
        self.max_length, self.warm_up_length = max_length, warm_up_length

    def setup(self, device: str) -> None:
        """Load the model and answer a first request with it."""
        if parent_process() is not None:  # Ctrl-C is for the main process, which then ends the workers by SIGTERM
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        model, tokenizer = open_model(**self.opened | {"device": device})
        if getattr(model.config, "causal", False):
            raise UserError("the model is causal: serve needs a diffusion model")
        self.max_length = min(self.max_length, model.config.max_position_embeddings)
        cancelled = self.spec.cancelled
        self.engine = Engine(model, tokenizer, self.max_batch_size, lambda owner: owner and cancelled[owner[2]])
        self.engine.waiting += self.decode_request(Request(prompt="?"), params=self.spec.defaults, owner=None)
        self.engine.finish()
        if self.spec.defaults.compile:
            self.engine.warm_up(self.warm_up_length, self.spec.defaults)

    def decode_request(self, request: Request, *, params: SamplingParams, owner: Any) -> list[Row]:
        """UserError if a prompt cannot be answered."""
        return list(request.rows(owner, params, self.engine, self.how, self.max_length))

    def authorize(self, request: fastapi.Request) -> None:
        """Called by LitServe before every endpoint."""
        given, wanted = request.headers.get("Authorization", ""), f"Bearer {self.key}"
        if self.key and request.url.path not in _OPEN and not compare_digest(given.encode(), wanted.encode()):
            raise HTTPException(401, "the API key is missing or wrong: send the header Authorization: Bearer KEY")


def make_server(
    opened: dict[str, Any],
    *,
    params: SamplingParams = DEFAULTS,
    name: str | None = None,
    devices: int | Literal["auto"] = "auto",
    workers_per_device: int = 1,
    max_batch_size: int = 32,
    max_waiting: int = 256,
    max_length: int = 4096,
    warm_up_length: int | None = None,
    timeout: float = 600.0,
    history: bool | None = None,
) -> ls.LitServer:
    """A server that is not started yet. The environment variable DREAM_API_KEY holds the API key, if there is one.

    Args:
        opened: arguments of `open_model`. Its device is `auto`, `cpu` or `cuda` here.
        params: sampling where a request says nothing. It needs forbid_mask, and blocks for rows to join in between.
        name: what clients call the model; by default the last part of `model`.
        devices: number of GPUs, each with a worker that has the whole model; auto uses all.
        workers_per_device: processes with the whole model on every device.
        max_batch_size: answers that a worker denoises at a time.
        max_waiting: answers that may wait for a worker; more requests get status 429.
        max_length: tokens of a prompt and its answer, at most the model's positions.
        warm_up_length: with params.compile, the tokens of prompt and answer whose CUDA graphs are captured, for all
            numbers of rows, before the server is ready. Those of other lengths take seconds at their first use. By
            default the largest answer and 256 tokens.
        timeout: seconds until a request is given up with status 504.
        history: take earlier messages; by default unless the model was trained on single questions.

    Raises:
        UserError: an option is out of its range, or `params` cannot be served.
    """
    counts = {"workers_per_device": workers_per_device, "max_batch_size": max_batch_size, "max_length": max_length}
    for option, value in counts.items():
        check_range(option, value, least=1, whole=True)
    check_range("max_waiting", max_waiting, least=0, whole=True)
    check_range("timeout", timeout, least=0.1)
    if warm_up_length is None:
        warm_up_length = min(params.max_new_tokens + 256, max_length)
    if params.compile:
        check_range("warm_up_length", warm_up_length, least=params.max_new_tokens + 1, most=max_length, whole=True)
    if (device := opened.get("device", "auto")) not in ("auto", "cpu", "cuda"):
        raise UserError(f"device is {device}, wanted auto, cpu or cuda: CUDA_VISIBLE_DEVICES chooses among GPUs")
    Request(prompt="?").params(params)
    cancelled = get_context("spawn").Array("b", _FLAGS, lock=False)
    how = trained(opened["model"])
    history = how.history if history is None else history
    endpoints = Endpoints(name or Path(opened["model"]).name, params, max_waiting, timeout, cancelled, history)
    api = DreamAPI(
        opened, how, max_length, warm_up_length, endpoints, max_batch_size=max_batch_size, batch_timeout=0.01
    )
    hardware = {"accelerator": device, "devices": devices, "workers_per_device": workers_per_device}
    server = ls.LitServer(api, **hardware, timeout=timeout, max_payload_size=_LARGEST, disable_openapi_url=True)
    endpoints.most_rows += max_batch_size * len(server.devices) * workers_per_device
    server.app.add_exception_handler(HTTPException, endpoints.failed)
    routes = server.app.router.routes
    routes.remove(next(route for route in routes if route.path == "/"))  # LitServe's own; the next one is the page
    return server
