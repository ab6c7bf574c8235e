"""A model on a hub and back: against a local server with the endpoints that huggingface_hub uses."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import ModelCard, constants
from material import SIZES, random_dream

from dream_lightning import DreamModel, cli, load_tokenizer
from dream_lightning.adapters import LoraParams, adapter_state, add_lora, base_hash, save_peft_folder
from dream_lightning.errors import UserError
from dream_lightning.export import export_model
from dream_lightning.hub import upload
from dream_lightning.locate import TRAINED, Trained, trained
from dream_lightning.model.loading import weight_files

BASE, TUNED, PRIVATE = "Dream-org/tiny", "me/tuned", "me/private"


class Hub(ThreadingHTTPServer):
    """Repositories in memory: name → commits, each a revision and its files."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.private = {}, {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def commit(self, repo, files):
        commits = self.repos.setdefault(repo, [])
        before = commits[-1][1] if commits else {}
        commits.append((hashlib.sha1(f"{repo}{len(commits)}".encode()).hexdigest(), before | files))
        return commits[-1][0]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def files(self, repo, revision):
        commits = self.server.repos.get(repo, [])
        return next(((sha, files) for sha, files in reversed(commits) if revision in ("main", sha)), (None, None))

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.headers["Authorization"] != "Bearer good":
            return self.answer({"error": "Invalid credentials"}, 401)
        hub = self.server
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            status = 409 if repo in hub.repos else 200
            if repo not in hub.repos:
                hub.repos[repo], hub.private[repo] = [], asked.get("private") or asked.get("visibility") == "private"
            return self.answer({"url": f"{hub.url}/{repo}"}, status)
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        _, _, _, owner, name, action, _ = self.path.split("/")
        if action == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            return self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        lines = [json.loads(line) for line in body.splitlines()]
        files = {e["value"]["path"]: base64.b64decode(e["value"]["content"]) for e in lines if e["key"] == "file"}
        oid = hub.commit(f"{owner}/{name}", files)
        return self.answer({"commitUrl": f"{hub.url}/{owner}/{name}/commit/{oid}", "commitOid": oid})

    def do_GET(self):
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(?:revision|tree)/(.+))?", path):
            sha, files = self.files(found[1], found[2] or "main")
            if files is None and (found[2] or found[1] not in self.server.repos):
                return self.answer({"error": "not here"}, 404, X_Error_Code="RevisionNotFound")
            if "/tree/" in path:
                sizes = {name: (len(content), hashlib.sha1(content).hexdigest()) for name, content in files.items()}
                return self.answer([{"type": "file", "path": n, "size": s, "oid": o} for n, (s, o) in sizes.items()])
            names = [{"rfilename": name} for name in files or ()]
            private = self.server.private.get(found[1], False)
            return self.answer({"id": found[1], "sha": sha, "private": private, "siblings": names})
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        sha, files = self.files(found[1], found[2])
        content = files[found[3]]
        return self.answer(content, X_Repo_Commit=sha, ETag=f'"{hashlib.sha1(content).hexdigest()}"')

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    places = {"ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(tmp_path / "cache")}
    for name, value in {**places, "HF_HUB_OFFLINE": False}.items():  # huggingface_hub reads HF_ENDPOINT at its import
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "good")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def base(tmp_path):
    """The folder of a tiny Dream."""
    ids = {"vocab_size": 320, "mask_token_id": 260, "pad_token_id": 256, "bos_token_id": 259, "eos_token_id": 256}
    return export_model(random_dream(**SIZES, **ids).bfloat16(), tmp_path / "base", tokenizer="bytes")


def files_of(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_adapters_go_to_the_hub_with_their_base_and_come_back(hub, base, tmp_path, capsys):
    """Merged and for PEFT, with a card; the base is a hub id with a revision."""
    revision = hub.commit(BASE, files_of(base))
    hub.commit(BASE, {"config.json": b"{}"})  # the newest revision is no Dream
    name = f"{BASE}@{revision}"
    model = DreamModel.from_pretrained(name)
    assert len(load_tokenizer(name)) == 263
    with pytest.raises(UserError, match=r"tiny@nowhere' is neither a folder here nor a hub id"):
        DreamModel.from_pretrained(f"{BASE}@nowhere")
    add_lora(model, LoraParams(rank=2))
    for n, p in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p)
    adapters = tmp_path / "adapters"
    about = {"name": name, "hash": base_hash(weight_files(base))}
    save_peft_folder(adapters, adapter_state(model.state_dict()), LoraParams(rank=2).config, about)
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    score = {"source": "openai/gsm8k", "accuracy": 0.5, "interval": [0.1, 0.9], "scored": 4, "tokens_per_forward": 2.0}
    card = {"model": {"name": str(adapters)}, "settings": {"sampling": {"steps": 8}, "shots": str(base)}}
    (evaluation / "card.json").write_text(json.dumps(card | {"tasks": {"gsm8k": score}}))
    (evaluation / "items.jsonl").write_text("")

    cli.run(["push-to-hub", f"--model={adapters}", f"--repo={TUNED}", f"--evaluation={evaluation}"])
    assert f"{hub.url}/{TUNED}" in capsys.readouterr().out
    ((sha, files),) = hub.repos[TUNED]
    assert str(tmp_path) not in files["card.json"].decode() + files["README.md"].decode()
    data = ModelCard(files["README.md"].decode()).data
    assert (data.base_model, data.license, data.eval_results[0].metric_value) == (BASE, "apache-2.0", 0.5)
    saved = json.loads(files["adapter/adapter_config.json"])
    assert (saved["base_model_name_or_path"], saved["revision"]) == (BASE, revision)
    merged = DreamModel.from_pretrained(f"{TUNED}@{sha}").eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model.eval()(ids).logits, rtol=0.05, atol=0.05)

    upload(str(adapters), "me/lora", adapter=True)
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} == hub.repos["me/lora"][-1][1].keys()


def test_the_card_says_what_a_checkpoint_was_trained_with(hub, base, tmp_path):
    model, path = DreamModel.from_pretrained(base), tmp_path / "last.ckpt"
    settings = {"model.weighting": "cart", "data.source": {"owner/rows": 0.5, str(tmp_path): 0.5}, "data.task": None}
    torch.save(
        {
            "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
            **{"dream_config": model.config.to_dict(), "tokenizer": "bytes", "settings": settings},
            "hyper_parameters": {"sampling": {"steps": 7}},
        },
        path,
    )
    upload(str(path), TUNED, license="mit")
    text = hub.repos[TUNED][-1][1]["README.md"].decode()
    data = ModelCard(text).data
    assert (data.license, data.datasets, data.base_model) == ("mit", ["owner/rows"], None)
    assert '| model.weighting | `"cart"` |' in text and '`{"steps": 7}`' in text and "data.task" not in text
    assert str(tmp_path) not in text
    assert trained(TUNED).sampling == {"steps": 7}
    revision = hub.commit(TUNED, {TRAINED: b"{"})
    with pytest.raises(UserError, match=rf"{revision}/{TRAINED} is damaged or no JSON object"):
        trained(f"{TUNED}@{revision}")
    hub.commit(BASE, files_of(base))
    assert trained(BASE) == Trained({})


def test_what_the_hub_refuses_is_an_error_with_a_remedy(hub, base, monkeypatch):
    hub.repos[TUNED] = []
    with pytest.raises(UserError, match="me/tuned exists and is public"):
        upload(str(base), TUNED, private=True)
    assert upload(str(base), PRIVATE, private=True).endswith(PRIVATE) and hub.private[PRIVATE]
    text = hub.repos[PRIVATE][-1][1]["README.md"].decode()
    assert "license:" not in text.partition("\n---\n")[0] and "License: not stated" in text
    with pytest.raises(UserError, match="the adapters' base is None, which nobody else can load: set pretrained"):
        upload(str(base), TUNED, adapter=True)
    monkeypatch.setenv("HF_TOKEN", "bad")
    with pytest.raises(UserError, match=r"the hub did not take me/tuned .*Invalid credentials.*: run `hf auth login`"):
        upload(str(base), TUNED)
    monkeypatch.setattr("dream_lightning.hub.get_token", lambda: None)
    with pytest.raises(UserError, match="there is no token of the Hugging Face hub here: run `hf auth login`"):
        upload(str(base), TUNED)


def test_llama_cpp_knows_every_tensor_of_the_exported_folder(base):
    """Under names of its own, one for each."""
    gguf = pytest.importorskip("gguf", reason="needs the package gguf")
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DREAM, SIZES["num_hidden_layers"])
    names = weight_files(base)
    renamed = {known.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    assert None not in renamed and len(renamed) == len(names)
