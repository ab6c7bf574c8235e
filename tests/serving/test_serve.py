"""The server as clients see it: OpenAI's own client, raw HTTP; and once as the command, in its processes."""

import asyncio
import os
import queue
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
import requests
import torch
from material import SIZES

from dream_lightning import SamplingParams, diffusion_generate, load_tokenizer
from dream_lightning.answering import answer_ids
from dream_lightning.batch import Example
from dream_lightning.cli import run
from dream_lightning.data.prompt_format import encode_prompt
from dream_lightning.export import export_model
from dream_lightning.model_factory import random_model
from dream_lightning.viewer import Conversation

uvicorn, litserve = (pytest.importorskip(n, reason="needs the extra serve") for n in ("uvicorn", "litserve"))
from dream_lightning.serving.api import CHAT_PATH  # noqa: E402
from dream_lightning.serving.engine import Engine  # noqa: E402
from dream_lightning.serving.requests import Request  # noqa: E402
from dream_lightning.serving.server import make_server  # noqa: E402

TOKENIZER = load_tokenizer("bytes")
PARAMS = SamplingParams(max_new_tokens=16, steps=8, block_length=8, forbid_mask=True, stop_at_eos=True)
LONG = {"prompt": "ab", "max_tokens": 400, "extra_body": {"sampling": {"steps": 400}}}  # takes seconds


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return random_model(SIZES | {"initializer_range": 0.4}, TOKENIZER).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "tiny"
    export_model(model, path, tokenizer="bytes")
    return path


class Here:
    """A server whose queues and worker are threads of this process."""

    def __init__(self, folder, **options):
        self.server = server = make_server({"model": str(folder), "device": "cpu"}, **{"params": PARAMS, **options})
        self.api, asked, self._responses = server.lit_api, queue.Queue(), queue.Queue()
        server.litapi_request_queues[CHAT_PATH] = asked
        server._transport, server.workers_setup_status = self, {"worker": litserve.utils.WorkerSetupStatus.READY}
        server.app.response_queue_id = self.api.spec.response_queue_id = 0
        self.api.spec.setup(server)
        self.api.setup("cpu")
        self.http = uvicorn.Server(uvicorn.Config(server.app, port=0, log_level="error"))
        self._ends = threading.Event()
        loop = (self.api, "cpu", 0, asked, self)
        self._threads = [threading.Thread(target=self.http.run), threading.Thread(target=self._work, args=loop)]

    def _work(self, *loop):
        while not self._ends.is_set():
            self.api.loop.run(*loop)

    def send(self, item, consumer_id):
        self._responses.put(item)

    async def areceive(self, consumer_id):
        try:
            return await asyncio.to_thread(self._responses.get, timeout=0.1)
        except queue.Empty:
            return None

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        while not self.http.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.http.servers[0].sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_):
        self._ends.set()
        self.http.should_exit = True
        for thread in self._threads:
            thread.join()

    def client(self, key="none", **options):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)

    def metric(self, name):
        text = requests.get(f"{self.url}/metrics").text
        return sum(float(x) for x in re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE))

    def waits_for(self, name, value):
        for _ in range(200):
            if self.metric(name) == value:
                return
            time.sleep(0.05)
        raise AssertionError(f"{name} is {self.metric(name)}")


@pytest.fixture(scope="module")
def here(folder):
    with Here(folder, max_batch_size=4) as here:
        yield here


def alone(model, prompt, params=PARAMS, seed=0, limit=None):
    out = diffusion_generate(model, torch.tensor([prompt]), params=params, sample_ids=torch.tensor([seed]))
    ids = out.sequences[0, len(prompt) :].tolist()[:limit]
    ids = ids[: ids.index(TOKENIZER.eos_token_id)] if TOKENIZER.eos_token_id in ids else ids
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def chat_ids(*messages):
    return encode_prompt(Example("", messages, None, "", None, ""), TOKENIZER)


def test_a_chat_and_its_stream_are_the_answer_of_the_sampler(here, model):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1?"}]
    asked = {"model": "tiny", "messages": messages, "max_tokens": 21}
    params = SamplingParams(**{**vars(PARAMS), "max_new_tokens": 24, "steps": 12})
    answer = here.client().chat.completions.create(**asked)
    (choice,) = answer.choices
    assert choice.message.content == alone(model, chat_ids(*messages), params, limit=21)
    assert answer.usage.prompt_tokens == len(chat_ids(*messages)) and answer.usage.completion_tokens <= 21
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    parts = [{"role": "developer", "content": [{"type": "text", "text": t} for t in ("be ", "brief")]}, messages[1]]
    extra = {"extra_body": {"stream_canvas": True}, "stream_options": {"include_usage": True}, "stream": True}
    *chunks, last = here.client().chat.completions.create(**asked | {"messages": parts} | extra)
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == choice.message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + [choice.finish_reason]
    assert last.usage == answer.usage and last.choices == []
    changes = dict(change for chunk in chunks for change in getattr(chunk, "canvas", {"changes": []})["changes"])
    assert sorted(changes) == list(range(len(changes))) and len(changes) >= answer.usage.completion_tokens
    assert len([c for c in chunks if c.choices[0].delta.content]) >= 2  # blocks


def test_completions_of_texts_and_ids_with_seeds_and_several_answers(here, model):
    client, prompts = here.client().completions, [[1, 2, 3], [200] * 9]
    noisy = SamplingParams(**{**vars(PARAMS), "temperature": 1.0})
    several = client.create(model="tiny", prompt=prompts, n=2, temperature=1, seed=5)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert [several.choices[i].text for i in (0, 2)] == [alone(model, p, noisy, seed=5) for p in prompts]
    assert several.choices[0].text != several.choices[1].text and several.usage.prompt_tokens == 12
    one = client.create(model="tiny", prompt="<|mask|>", temperature=1)  # text, not the mask token
    assert one.choices[0].text == alone(model, list(b"<|mask|>"), noisy, seed=one.seed)
    cut = client.create(model="tiny", prompt="ab", stop=[alone(model, list(b"ab"))[3:5], "?!"])
    assert cut.choices[0].text == alone(model, list(b"ab"))[:3] and cut.choices[0].finish_reason == "stop"
    given = {"sampling": {"block_length": 4, "steps": 4, "alg": "maskgit_plus"}}
    ours = client.create(model="tiny", prompt="ab", extra_body=given)
    assert ours.choices[0].text == alone(model, list(b"ab"), SamplingParams(**{**vars(PARAMS), **given["sampling"]}))


WRONG = {
    "{": "the body is",
    "[]": "the body is",
    '{"prompt": ""}': "prompt",
    '{"prompt": [3, 9999]}': "a token id is 9999, wanted at least 0 and at most",
    '{"prompt": [260, 262]}': "mask token",
    '{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}': "takes a prompt, and not the other",
    '{"messages": [{"role": "user", "content": "a"}]}': "takes a prompt",
    '{"prompt": "a", "temprature": 1}': "temprature is 1",
    '{"prompt": "a", "temperature": -1}': "temperature is -1.0, it must be finite and at least 0",
    '{"prompt": "a", "max_tokens": "9"}': "max_tokens is '9'",
    '{"prompt": "a", "max_tokens": 9999}': "wanted at most 512",
    '{"prompt": "a", "n": 2}': "n is 2, and all answers would be equal: set temperature",
    '{"prompt": "a", "stop": [""]}': "stop has an empty text",
    '{"prompt": "a", "presence_penalty": 1}': "presence_penalty is 1",
    '{"prompt": "a", "sampling": {"block_length": "x"}}': "block_length is 'x', wanted a whole number",
    '{"prompt": "a", "sampling": {"blocks": 2}}': "sampling has blocks, wanted fields of SamplingParams",
    '{"prompt": "a", "sampling": {"steps": 1000}}': "steps is 1000, wanted at most one for each new token",
    '{"prompt": "a", "sampling": {"forbid_mask": false, "stop_at_eos": false, "block_length": null}}': "forbid_mask is",
    '{"prompt": "a", "sampling": {"cache": "prefix"}}': "cache is prefix",
    '{"prompt": "a", "sampling": {"max_length": 99}}': "block_length is 8 and max_length 99, which may end inside",
    '{"prompt": "ab", "sampling": {"max_length": 2, "block_length": null}}': "a prompt of 2 tokens, is 2, wanted",
    '{"prompt": "a", "sampling": {"seed": 3}}': "sampling has compile, max_new_tokens or seed",
    '{"prompt": "a", "sampling": {"banned_tokens": [-1]}}': "a token id is -1",
}


def test_wrong_requests_get_openais_errors(here):
    for body, message in WRONG.items():
        answer = requests.post(f"{here.url}/v1/completions", body)
        assert answer.status_code == 400 and message in answer.json()["error"]["message"], (body, answer.text)
        assert answer.json()["error"]["type"] == "invalid_request_error"
    for path, content, status in (
        *((CHAT_PATH, {"prompt": "a"}, 400), (CHAT_PATH, {"messages": [{"role": "user", "content": ["a"]}]}, 400)),
        *(("/v1/completions", {"prompt": "a" * (9 << 20)}, 413), ("/v1/nothing", {}, 404)),
        ("/v1/completions", {"prompt": ["a"] * 500}, 429),
    ):
        answer = requests.post(here.url + path, json=content)
        assert answer.status_code == status and answer.json()["error"]["code"] == str(status)
    with pytest.raises(openai.NotFoundError, match=r"model is 'gpt', this server has tiny: set model"):
        here.client().completions.create(model="gpt", prompt="a")


def test_an_answer_that_ends_at_max_length_is_the_same_everywhere(model):
    params = SamplingParams(max_new_tokens=40, max_length=60, min_new_tokens=30, steps=8, forbid_mask=True)
    texts = ["2+2?", "what is 12 + 345?"]
    prompts = [chat_ids({"role": "user", "content": text}) for text in texts]
    engine, answers = Engine(model, TOKENIZER, 4), answer_ids(model, prompts, params)
    assert [len(answer) for answer in answers] == [60 - len(prompt) for prompt in prompts]
    how = SimpleNamespace(style="chat", system_prompt=None)
    for text, prompt, answer in zip(texts, prompts, answers, strict=True):
        out = diffusion_generate(model, torch.tensor([prompt]), params=params)
        *_, frame = Conversation(model, TOKENIZER, params).ask(text)
        request = Request(messages=[{"role": "user", "content": text}], seed=0)
        (row,) = request.rows(None, request.params(params), engine, how, 512)
        engine.waiting.append(row)
        engine.finish()
        assert answer == out.sequences[0, len(prompt) :].tolist() == frame.ids == row.ids
        assert row.limit == len(answer)


def test_many_clients_get_their_own_answers(here, model):
    dice = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 256, (n % 23 + 1,), generator=dice).tolist() for n in range(32)]
    client = here.client()

    def ask(n):
        options = {"model": "tiny", "prompt": prompts[n], "max_tokens": 8 * (1 + n % 3), "stream": n % 2 == 0}
        answer = client.completions.create(**options)
        return "".join(chunk.choices[0].text for chunk in answer) if n % 2 == 0 else answer.choices[0].text

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(32)))
    for n, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        size = 8 * (1 + n % 3)
        assert answer == alone(
            model, prompt, SamplingParams(**{**vars(PARAMS), "max_new_tokens": size, "steps": size // 2})
        )
    here.waits_for('dream_rows{state="running"}', 0)


def test_a_client_that_leaves_frees_its_row(here):
    left = here.metric('dream_requests_total{status="499"}')
    with here.client().completions.create(model="tiny", stream=True, **LONG) as stream:
        next(iter(stream))
        assert here.metric('dream_rows{state="running"}') == 1
    with pytest.raises(openai.APITimeoutError):
        here.client(timeout=0.3).completions.create(model="tiny", **LONG)
    here.waits_for('dream_requests_total{status="499"}', left + 2)
    assert here.metric('dream_rows{state="running"}') == here.metric('dream_rows{state="waiting"}') == 0
    here.client().completions.create(model="tiny", prompt="a")  # the worker is free
    assert not here.api.engine.active


def test_a_full_queue_a_timeout_and_a_key(folder, monkeypatch):
    monkeypatch.setenv("DREAM_API_KEY", "secret")
    with Here(folder, max_batch_size=1, max_waiting=1, timeout=0.5, history=False) as here:
        with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
            here.client("public").models.list()
        assert requests.get(f"{here.url}/metrics").status_code == 401
        assert requests.get(f"{here.url}/health").text == "ok" and requests.get(here.url).status_code == 200
        client = here.client("secret")
        assert [model.id for model in client.models.list()] == ["tiny"]
        again = [{"role": role, "content": "1+1?"} for role in ("user", "assistant", "user")]
        with pytest.raises(
            openai.BadRequestError, match=r"trained on single questions: .* or start serve with --history"
        ):
            client.chat.completions.create(model="tiny", messages=again)
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(client.completions.create, model="tiny", **LONG) for _ in range(3)]
        assert sorted(answer.exception().status_code for answer in asked) == [429, 504, 504]
        with pytest.raises(openai.APIError, match=r"no answer within 0\.5 s"):
            list(client.completions.create(model="tiny", stream=True, **LONG))


def test_the_page_needs_nothing_from_outside(here):
    page = requests.get(here.url).text
    assert "<title>tiny</title>" in page and "--accent" in page and "$" not in page
    assert not re.search(r"https?:|\bsrc=|@import|url\(", page)


def test_a_checkpoint_says_how_to_ask(tmp_path):
    settings = {"data.style": "bare", "data.system_prompt": "Add.", "data.several_turns": False}
    torch.save({"settings": settings, "state_dict": {}}, tmp_path / "last.ckpt")
    api = make_server({"model": str(tmp_path / "last.ckpt"), "device": "cpu"}).lit_api
    assert "const several = false" in asyncio.run(api.spec.page()).body.decode() and not api.spec.history
    assert make_server({"model": str(tmp_path / "last.ckpt"), "device": "cpu"}, history=True).lit_api.spec.history
    api.engine = SimpleNamespace(tokenizer=TOKENIZER, model=SimpleNamespace(config=SimpleNamespace(vocab_size=320)))
    system, user = {"role": "system", "content": "Sum."}, {"role": "user", "content": "1+1"}
    for messages, prompt in (([user], "Add.\n\n1+1\n"), ([system, user], "Sum.\n\n1+1\n")):
        (row,) = api.decode_request(Request(messages=messages), params=PARAMS, owner=None)
        assert TOKENIZER.decode(row.prompt) == prompt
    with pytest.raises(ValueError, match="several messages or tools, bare holds one"):
        api.decode_request(Request(messages=[user, user]), params=PARAMS, owner=None)


def test_options_are_checked_before_anything_starts(folder):
    for options, message in (
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"timeout": 0}, "timeout is 0"),
        ({"params": SamplingParams()}, "forbid_mask is false"),
    ):
        with pytest.raises(ValueError, match=message):
            make_server({"model": str(folder)}, **options)


@pytest.mark.slow  # processes of its own and a load test: half a minute
def test_the_command_and_its_load_test(folder, capfd, monkeypatch):
    """In processes of its own, which SIGTERM ends."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    benchmark = import_module("benchmark_serve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    shapes = {"clients": [1, 3], "rounds": 1, "prompt": 8, "new_tokens": 8, "block": 4, "prompts": 3}
    errors = []

    def use():
        try:
            for _ in range(600):
                if benchmark.is_healthy(url):
                    break
                time.sleep(0.1)
            benchmark.main(str(folder), url=url, **shapes)
        except BaseException as error:
            errors.append(error)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    user = threading.Thread(target=use)
    user.start()
    run(["serve", f"--model={folder}", "--device=cpu", f"--port={url.rpartition(':')[2]}"])
    user.join()
    assert not errors
    assert re.findall(r"\| (\d \| \d) \|.*(\| 0 \| \d \| 0 \|)\n", capfd.readouterr().out)[-2:] == [
        ("1 | 1", "| 0 | 1 | 0 |"),
        ("3 | 3", "| 0 | 3 | 0 |"),
    ]
