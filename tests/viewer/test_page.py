"""The page's data is the history, nothing in it can break out, and it needs nothing from outside."""

import html
import io
import json
import re
import shutil
import subprocess

import pytest
import torch
from material import SIZES

from dream_lightning import SamplingParams, diffusion_generate, load_tokenizer
from dream_lightning.adapters import LoraParams, add_lora, base_hash
from dream_lightning.cli import run
from dream_lightning.export import export_model
from dream_lightning.model.loading import weight_files
from dream_lightning.model_factory import random_model
from dream_lightning.sampling import GenerationOutput
from dream_lightning.viewer import denoising_page
from dream_lightning.viewer.commands import open_model

TOKENIZER = load_tokenizer("bytes")


def data_of(page):
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found)


def state_after(data, step):
    return [next((i for when, i in reversed(t["changes"]) if when <= step), t["start"]) for t in data["tokens"]]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return random_model(SIZES | {"max_position_embeddings": 128}, TOKENIZER).eval()


@pytest.mark.parametrize("options", [{"forbid_mask": True}, {"alg": "origin", "temperature": 1.0}, {}])
def test_every_state_can_be_read_from_the_page(model, options):
    """Also where the model predicts masks, so that a position is filled and masked again."""
    prompt = torch.tensor(TOKENIZER("hello")["input_ids"])
    params = SamplingParams(max_new_tokens=20, steps=7, **options)
    output = diffusion_generate(model, prompt[None], params=params, return_history=True)
    data = data_of(denoising_page(output, prompt, TOKENIZER))
    assert data["steps"] == 7
    assert state_after(data, 0) == prompt.tolist() + [TOKENIZER.mask_token_id] * 20
    for step in range(1, 8):
        assert state_after(data, step) == output.history[step - 1, 0].tolist()
    shown = [token["confidence"] for token in data["tokens"]]
    assert shown == pytest.approx(output.confidence[0].tolist(), abs=1e-4)
    assert [token["prompt"] for token in data["tokens"]] == [True] * 5 + [False] * 20


def test_masks_in_the_prompt_are_positions_to_fill(model):
    prompt = torch.tensor([*TOKENIZER("a")["input_ids"], TOKENIZER.mask_token_id, *TOKENIZER("b")["input_ids"]])
    params = SamplingParams(max_new_tokens=0, steps=1, forbid_mask=True)
    output = diffusion_generate(model, prompt[None], params=params, return_history=True, infill=True)
    first, second, third = data_of(denoising_page(output, prompt, TOKENIZER))["tokens"]
    assert not first["changes"] and not third["changes"]
    assert second["changes"] == [[1, output.sequences[0, 1].item()]]


def test_texts_are_escaped_and_nothing_is_loaded():
    evil = "</script><script>alert(1)</script><!--"
    ids = torch.tensor([TOKENIZER(evil)["input_ids"]])
    output = GenerationOutput(ids, ids[None], torch.zeros_like(ids), torch.ones(ids.shape))
    page = denoising_page(output, ids[0], TOKENIZER, title=evil, notes={evil: evil})
    assert page.count("<script") == page.count("</script>") == 2 and "<!--" not in page
    assert "&lt;script&gt;alert(1)" in page
    data = data_of(page)
    assert "".join(data["texts"][str(i)] for i in state_after(data, 1)) == evil
    assert not re.search(r"https?:|\bsrc=|\bhref=|@import|url\(|\$", page.replace(json.dumps(evil), ""))
    assert page.startswith("<!doctype html>")


def test_bytes_of_a_shared_character_are_shown_as_bytes():
    ids = torch.tensor([TOKENIZER("é\n")["input_ids"]])
    output = GenerationOutput(ids, ids[None], torch.zeros_like(ids), torch.ones(ids.shape))
    data = data_of(denoising_page(output, ids[0], TOKENIZER))
    assert [data["texts"][str(i)] for i in ids[0].tolist()] == ["⟨C3⟩", "⟨A9⟩", "\n"]


def test_an_output_that_cannot_be_shown_is_refused(model):
    prompt = torch.tensor([TOKENIZER("ab")["input_ids"]] * 2)
    params = SamplingParams(max_new_tokens=4, steps=2, forbid_mask=True)
    for rows, return_history in ((1, False), (2, True)):
        output = diffusion_generate(model, prompt[:rows], params=params, return_history=return_history)
        with pytest.raises(ValueError, match="not one row with a history"):
            denoising_page(output, prompt[0], TOKENIZER)


def test_the_commands_take_a_folder_and_a_checkpoint(model, tmp_path, capsys, monkeypatch):
    folder, checkpoint = tmp_path / "folder", tmp_path / "last.ckpt"
    export_model(model, folder, tokenizer="bytes")
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "dream_config": model.config.to_dict()}, checkpoint)
    short = ["--device=cpu", "--params.max_new_tokens=8", "--params.steps=4"]
    pages, out = [], tmp_path / "page.html"
    for source in ([f"--model={folder}"], [f"--model={checkpoint}", "--tokenizer=bytes"]):
        run(["show-denoising", *source, "--question=1+1=?", f"--out={out}", *short])
        assert "4 steps, 8 new tokens" in capsys.readouterr().out
        pages.append(data_of(out.read_text(encoding="utf-8")))
    assert pages[0] == pages[1]
    monkeypatch.setattr("sys.stdin", io.StringIO("1+1=?\n/quit\n"))
    run(["chat", f"--model={folder}", *short])
    assert " tokens in " in capsys.readouterr().out


def test_the_report_and_a_row_of_a_file(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    file = tmp_path / "train.jsonl"
    file.write_text('{"question": "1+1?", "response": "<think>one and one</think>2"}\n')
    source = [f"--source={file}", "--tokenizer=bytes"]
    run(["data-report", *source, "--max_length=35"])
    assert re.search(r"shortened: cut part +\| +1 ", capsys.readouterr().out)
    for t, shown in ((0, "<think>\none and one\n</think>\n2⏹"), (1, "⟦<think>\none and one\n</think>\n2⟧⟦⏹⟧")):
        run(["show", *source, f"--t={t}"])
        printed = capsys.readouterr().out
        assert "train.jsonl, row 1" in printed and shown in printed
    config = tmp_path / "config.yaml"
    config.write_text(f"data: {{source: {{{file}: 1}}, max_length: 90, batch_size: 3}}\nmodel: {{tokenizer: bytes}}\n")
    run(["data-report", f"--config={config}"])
    assert "max_length 90" in capsys.readouterr().out
    messages = [{"role": role, "content": f"{n} {role}"} for n in (1, 2) for role in ("user", "assistant")]
    file.write_text(json.dumps({"messages": messages}) + "\n")
    for train_on, trained in (("last", ["2 assistant"]), ("all", ["1 assistant", "2 assistant"])):
        run(["show", f"--config={config}", f"--train_on={train_on}", "--max_length=400", "--t=0"])
        assert re.findall(r"── response.*\n(.*)⏹", capsys.readouterr().out) == trained
    run(["show", f"--config={config}", "--max_length=400", "--t=0", "--tokens=true", "--extra_weight={as: 2.5}"])
    lines = capsys.readouterr().out.splitlines()
    assert f"{ord('2'):>7}     1  '2'" in lines and f"{ord('s'):>7}   2.5  's'" in lines
    assert f"{ord('1'):>7}     –  '1'" in lines
    file.write_text(json.dumps({"id": "\x1b[2J", "question": "\x1b]52;c;aGk=\x07", "response": "\x9b8m"}) + "\n")
    run(["show", *source, "--t=0"])
    printed = capsys.readouterr().out
    assert "␛]52;c;aGk=␇" in printed and "⟨U+009B⟩8m" in printed and "\x1b" not in printed


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing.ckpt", "does not exist: name a run"), ("there.ckpt", "there.ckpt is damaged or no checkpoint")],
)
def test_wrong_checkpoints_are_refused(tmp_path, name, message):
    (tmp_path / "there.ckpt").write_text("torn")
    with pytest.raises(ValueError, match=message):
        open_model(str(tmp_path / name), tokenizer="bytes")


def test_an_unknown_device_is_refused_before_anything_loads():
    for device in ("gpu", "cuda:99", "cuda:x", "meta"):
        with pytest.raises(ValueError, match=f"device is {device} .*: set cpu"):
            open_model("missing", device=device)


def test_a_checkpoint_of_adapters_knows_its_base(model, tmp_path):
    """The tokenizer and the weights come from the base, the adapters are added."""
    export_model(model, tmp_path / "base", tokenizer="bytes")
    base = {"name": str(tmp_path / "base"), "hash": base_hash(weight_files(tmp_path / "base"))}
    lora = LoraParams(rank=2)
    add_lora(model, lora)
    state = {f"model.{n}": torch.full_like(p, 0.1) for n, p in model.named_parameters() if p.requires_grad}
    common = {"state_dict": state, "dream_config": model.config.to_dict()}
    torch.save(common | {"lora": lora.config, "base": base}, tmp_path / "last.ckpt")
    network, words = open_model(str(tmp_path / "last.ckpt"), device="cpu")
    whole, _ = open_model(str(tmp_path / "base"), device="cpu")
    assert len(words) == len(TOKENIZER) and network.state_dict().keys() == whole.state_dict().keys()
    assert not torch.equal(
        network.model.layers[0].self_attn.q_proj.weight, whole.model.layers[0].self_attn.q_proj.weight
    )


def test_a_checkpoint_needs_its_own_tokenizer(model, tmp_path):
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "dream_config": model.config.to_dict()}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="holds no tokenizer: set tokenizer"):
        open_model(str(tmp_path / "last.ckpt"))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_on_a_phone_buttons_are_in_one_row_and_a_tap_shows_details(model, tmp_path):
    prompt = torch.tensor(TOKENIZER("hello")["input_ids"])
    params = SamplingParams(max_new_tokens=20, steps=4, forbid_mask=True)
    page = denoising_page(
        diffusion_generate(model, prompt[None], params=params, return_history=True), prompt, TOKENIZER
    )
    ask = """<script>
      const tops = [...document.querySelector(".row").children].map(x => x.getBoundingClientRect());
      const rows = new Set(tops.map(box => Math.round((box.top + box.bottom) / 20))).size;
      document.querySelector("#prompt span").dispatchEvent(
        new PointerEvent("click", { bubbles: true, pointerType: "touch" }));
      const width = document.documentElement.scrollWidth;
      parent.document.title = [rows, width, at("tip").hidden, at("tip").textContent].join("|");
    </script>"""
    frame = html.escape(page.replace("</body>", ask + "</body>"))
    (tmp_path / "phone.html").write_text(f'<iframe width=390 height=800 style="border:0" srcdoc="{frame}"></iframe>')
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    shown = subprocess.run(
        ["chromium", *options, f"file://{tmp_path}/phone.html"], capture_output=True, text=True, timeout=60
    )
    (title,) = re.findall("<title>(.*?)</title>", shown.stdout, re.DOTALL)
    assert title.split() == ['1|390|false|"h"', "given"]
