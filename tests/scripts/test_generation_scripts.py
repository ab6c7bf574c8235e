"""The benchmark and the curve, run small."""

import importlib.util
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml
from material import save_tiny_folder

from dream_lightning.data.layout import plain_ids, response_text
from dream_lightning.data.records import read_examples
from dream_lightning.model import load_tokenizer

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_folder(tmp_path_factory.mktemp("tiny"), positions=256)


def test_benchmark(folder, capsys):
    script("benchmark_generate").main(folder, prompt=16, new_tokens=16, block=4, many=2, most=3)
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines[lines.index("|---|---|---|---|---|---|") :] if line.startswith("|")]
    assert len(steps) == 1 + 9 + 2 + 2 + 3 * 4
    assert all(float(line.split("|")[3]) > 0 for line in steps[1:10])


def test_curve(folder, tmp_path, capsys):
    out = tmp_path / "curve"
    script("curve").main(
        folder, str(out), questions=3, new_tokens=8, block=4, tokens_per_step=(4,), thresholds=(0.5,), factors=(1.0,)
    )
    lines = out.with_suffix(".md").read_text().splitlines()
    fixed = "| tokens_per_step 4 | 4.00 · 0.0% | 4.00 · 0.0% | 4.00 · 0.0% | – |"
    assert lines.count(fixed) == 4 and len([line for line in lines if line.startswith("| steps 2 | –")]) == 4
    svg = ET.parse(out.with_suffix(".svg")).getroot()
    assert len(svg.findall("{*}polyline")) == 4 * 4


def test_sums_are_written_for_training(tmp_path, capsys):
    script("write_sums").main(str(tmp_path / "sums"), digits=8, train_rows=200, validation_rows=10)
    examples = {split: read_examples(tmp_path / "sums" / f"{split}.jsonl") for split in ("train", "validation")}
    assert [len(examples[split]) for split in examples] == [200, 10]
    tokenizer, config = load_tokenizer("bytes"), yaml.safe_load((SCRIPTS.parent / "configs/sums_gpu.yaml").read_text())
    longest = max(len(plain_ids(response_text(e), tokenizer)) + 1 for some in examples.values() for e in some)
    assert longest <= config["data"]["eos_fill_to"] == config["model"]["sampling"]["max_new_tokens"]
