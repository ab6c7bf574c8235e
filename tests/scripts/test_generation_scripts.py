"""The benchmark and the curve, run small."""

import importlib.util
import random
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml
from material import save_tiny_folder

from dream_lightning.data.prompt_format import plain_ids, response_text
from dream_lightning.data.schemas import read_examples
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
    examples = {s: read_examples(tmp_path / "sums" / f"{s}.jsonl") for s in ("train", "validation", "hard")}
    assert [len(examples[split]) for split in examples] == [200, 10, 10]
    tokenizer, config = load_tokenizer("bytes"), yaml.safe_load((SCRIPTS.parent / "configs/sums_gpu.yaml").read_text())
    longest = max(len(plain_ids(response_text(e), tokenizer)) + 1 for some in examples.values() for e in some)
    assert longest <= config["data"]["eos_fill_to"] == config["model"]["sampling"]["max_new_tokens"]


@pytest.mark.parametrize(("digits", "through"), [(8, 5), (8, 7), (8, 0), (1, 0), (3, 2)])
def test_a_hard_sum_carries_through(digits, through):
    for seed in range(200):
        a, b = script("write_sums").hard_sum(random.Random(seed), digits, through)
        assert len(str(a)) == len(str(b)) == digits
        sums = [int(x) + int(y) for x, y in zip(str(a)[::-1], str(b)[::-1], strict=True)]
        assert any(
            sums[begins] >= 10 and set(sums[begins + 1 : begins + 1 + through]) <= {9}
            for begins in range(digits - through)
        )


def test_a_carry_has_to_begin_somewhere():
    with pytest.raises(ValueError, match="through 8 of 8 columns: take carried_through below digits"):
        script("write_sums").hard_sum(random.Random(0), 8, 8)
