"""The scripts, run small."""

import importlib
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from material import save_tiny_folder
from safetensors.torch import load_file

from dream_lightning.model import DreamModel, load_tokenizer

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TINY = {
    **{"vocab_size": 320, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2},
    **{"num_attention_heads": 6, "num_key_value_heads": 2, "mask_token_id": 260, "eos_token_id": 256, "device": "cpu"},
}


@pytest.fixture
def script(monkeypatch):
    """`script("compare_bases")` → the module."""
    monkeypatch.syspath_prepend(SCRIPTS)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) & {file.stem for file in SCRIPTS.glob("*.py")} - before:
        del sys.modules[name]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return save_tiny_folder(tmp_path_factory.mktemp("tiny"), positions=1200)


def test_shell_scripts_parse():
    for file in SCRIPTS.glob("*.sh"):
        parsed = subprocess.run(["bash", "-n", file], capture_output=True, text=True)
        assert parsed.returncode == 0, parsed.stderr


def test_generation_benchmark(script, folder, capsys):
    script("benchmark_generate").main(folder, prompt=16, new_tokens=16, block=4, many=2, most=3)
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines[lines.index("|---|---|---|---|---|---|") :] if line.startswith("|")]
    assert len(steps) == 1 + 9 + 2 + 2 + 3 * 4
    assert all(float(line.split("|")[3]) > 0 for line in steps[1:10])


def rows_of(printed):
    """Name → cells of the rows of Markdown tables."""
    cells = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    return {name: rest for name, *rest in cells}


def test_variance_benchmark(script, few_bundled, capsys, monkeypatch):
    benchmark = script("benchmark_variance")
    monkeypatch.setattr(benchmark, "VALIDATED", 8)
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda *_, **__: nullcontext(SimpleNamespace(map=map)))
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setitem(benchmark.MODELS, "tiny", (small, 1e-3))
    benchmark.main(weightings=["none"], rows=2, seeds=1, steps=3, warm_up=1, draws=2)
    printed = capsys.readouterr().out.split("\n\n**")
    for part in printed[1:]:
        rows = rows_of(part)
        assert benchmark.SCHEMES.keys() <= rows.keys() and "(1.00 ± 0.00)" in rows["independent t"][0]
        assert "nan" not in part


def test_comparison_of_bases(script, folder, capsys, monkeypatch):
    compare = script("compare_bases")
    write = compare.write
    monkeypatch.setattr(compare, "write", lambda path, count, seed: write(path, count // 50, seed))
    compare.main(folder, ("bfloat16", "float8"), seeds=1, steps=2)
    rows = rows_of(capsys.readouterr().out)
    for base in ("bfloat16", "float8"):
        before, after, mean = map(float, rows[base])
        assert before != after and after == mean


@pytest.mark.parametrize("max_shard_size", ["5GB", "40KB"])
def test_a_random_checkpoint_loads_and_has_its_distribution(script, tmp_path, max_shard_size):
    options = {"tokenizer": "bytes", "max_shard_size": max_shard_size, "initializer_range": 0.1}
    script("random_checkpoint").main(str(tmp_path / "new"), **options, **TINY)
    assert (len(list(tmp_path.glob("new/*.safetensors"))) == 1) == (max_shard_size == "5GB")
    model = DreamModel.from_pretrained(tmp_path / "new")
    assert model.dtype == torch.bfloat16 and len(load_tokenizer(tmp_path / "new")) == 263
    for name, tensor in model.float().state_dict().items():
        if "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor))
        elif tensor.dim() == 2:
            assert abs(tensor.std() / 0.1 - 1) < 0.1 and abs(tensor.mean()) < 0.01
        else:
            assert 0 < tensor.abs().max() < 1  # biases too
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


def test_a_random_checkpoint_depends_on_its_seed(script, tmp_path):
    heads = []
    for number, seed in enumerate([1, 1, 2]):
        script("random_checkpoint").main(str(tmp_path / str(number)), seed=seed, **TINY)
        heads.append(load_file(tmp_path / str(number) / "model.safetensors")["lm_head.weight"])
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_default_random_checkpoint_has_the_official_names_files_and_sizes(script, shared, tmp_path, monkeypatch):
    """The tensors stay on the meta device and no weights are written."""
    module = script("random_checkpoint")
    monkeypatch.setattr(module, "random_like", lambda tensor, *_: tensor)
    monkeypatch.setattr(module, "save_file", lambda tensors, path, **_: path.write_text("\n".join(tensors)))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=16e9))
    module.main(str(tmp_path), device="cpu")
    official = shared("data/dream-v0-instruct-7b")
    names = ("model.safetensors.index.json", "config.json")
    (index, config), (new_index, new) = ([json.loads((f / n).read_text()) for n in names] for f in (official, tmp_path))
    assert new_index == index
    for file in set(index["weight_map"].values()):
        expected = {name for name, other in index["weight_map"].items() if other == file}
        assert set((tmp_path / file).read_text().splitlines()) == expected
    fields = config.keys() - {"_name_or_path", "transformers_version"}
    assert {k: config[k] for k in fields} == {k: new.get(k) for k in fields}


def test_a_multi_gpu_check_that_is_stopped_leaves_no_training_behind(script, tmp_path, monkeypatch):
    """fit runs in a session of its own and would keep the GPUs."""
    check = script("check_multi_gpu")
    (tmp_path / "fit.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    monkeypatch.setattr(check, "__file__", str(tmp_path / "fit.py"))
    log, sleep = tmp_path / "run.txt", time.sleep

    def stop(seconds):
        if log.read_text():
            raise KeyboardInterrupt
        sleep(seconds)

    monkeypatch.setattr(check.time, "sleep", stop)
    with pytest.raises(KeyboardInterrupt):
        check.fit(tmp_path / "run", [], until=1)
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


def test_every_case_is_compared_with_its_reference(script, folder, monkeypatch, capsys):
    benchmark = script("benchmark_train")
    small = benchmark.Case("lora", 2, 64, compiled=False, accumulate=2)
    monkeypatch.setattr(benchmark, "CASES", {"small": small})
    benchmark.main(folder, cases=["small"], steps=3)
    cells = rows_of(capsys.readouterr().out)["lora, r 16 on all-linear, 2 × 64, 2 micro-batches a step"]
    ours, reference, times = (float(cells[i].replace(",", "")) for i in (0, 7, 9))
    least, most = (ours - 0.5) / (reference + 0.5), (ours + 0.5) / (reference - 0.5)  # as rounded as they are shown
    assert least - 0.005 <= times <= most + 0.005


def test_documents_of_the_benchmark_are_packed_whole(script):
    benchmark = script("benchmark_train")
    rows = benchmark.PackedRows(6, benchmark.Case("lora", 2, 8192))
    assert len(rows) == 6 and all(sum(rows.lengths[i] for i in row) <= 8192 for row in rows.rows)
    assert 0.8 < rows.useful <= 1


def test_idle_time_is_what_no_kernel_covers(script):
    intervals = [(10, 12, "c"), (0, 5, "a"), (2, 4, "b"), (11, 15, "d")]
    busy, gaps = script("profile_fit").busy_and_gaps(intervals)
    assert busy == 10 and gaps == [(5, ("a", "c"))]


@pytest.mark.parametrize(
    ("steps", "batches", "words"), [(13, 600, "training takes 13 steps"), (60, 39, "an epoch takes 13 steps")]
)
def test_a_run_or_an_epoch_too_short_for_idle_time_is_refused(script, steps, batches, words):
    """Steps of two epochs would count the start of the loader's processes as idle time."""
    callback = script("profile_fit").GPUTime()

    def start(steps, batches):
        run = {"estimated_stepping_batches": steps, "num_training_batches": batches, "accumulate_grad_batches": 3}
        callback.on_train_start(SimpleNamespace(**run), None)

    start(14, 42)
    with pytest.raises(ValueError, match=f"{words}: wanted at least 10 to warm up and 4 to record"):
        start(steps, batches)
