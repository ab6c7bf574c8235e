"""Puzzles that are made can be solved, have one solution where they promise it, and never cross the two parts."""

import itertools
import json
import re

import pytest
import torch

from dream_lightning.cli import run
from dream_lightning.data import puzzles
from dream_lightning.data.prompt_format import response_text
from dream_lightning.data.schemas import read_examples
from dream_lightning.errors import UserError
from dream_lightning.tasks.registry import grade_response


@pytest.mark.parametrize(
    "options",
    [["--kind", "countdown", "--numbers", "3"], ["--kind", "countdown"], ["--kind", "sudoku", "--side", "4"]],
)
def test_written_puzzles_are_asked_in_digits_and_solved_by_their_responses(options, tmp_path, capsys):
    asked = {}
    for part in ("train", "test"):
        file = tmp_path / f"{part}.jsonl"
        run(["make-puzzles", *options, "--clues", "4", "--count", "20", "--part", part, "--out", str(file)])
        assert f"wrote {file}: 20 puzzles" in capsys.readouterr().out
        examples = read_examples(str(file))
        asked[part] = {example.prompt[-1]["content"] for example in examples}
        for row, example in zip(map(json.loads, file.read_text().splitlines()), examples, strict=True):
            assert example.prompt[-1]["content"] == row["prompt"]
            assert grade_response(example.answer, example).correct
            assert not grade_response(example.answer[:-1] + "x", example).correct
    assert len(asked["train"]) == len(asked["test"]) == 20 and not asked["train"] & asked["test"]


@pytest.mark.parametrize("numbers", [3, 4])
def test_in_words_every_step_is_tried_and_true_until_the_target_is_made(numbers, tmp_path):
    file = tmp_path / "words.jsonl"
    options = f"--kind countdown --words true --numbers {numbers} --count 40 --out {file}"
    run(["make-puzzles", *options.split()])
    for example in read_examples(str(file)):
        assert response_text(example).startswith("<think>\n")
        assert grade_response(response_text(example), example).correct
        *dead, last = [line for line in example.thinking.splitlines() if "That leaves" not in line]
        target = example.record["target"]
        for line in (*dead, last):
            a, sign, b, result, rest = re.match(r"(\d+)([-+*/])(\d+)=(\d+)(.*)", line).groups()
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}[
                sign
            ] == int(result)
            made = re.findall(r"\d+", rest.partition("makes")[2])
            assert (str(target) in made) == (line == last)
        left = re.findall("leaves (.*)\\.", example.thinking)[-1:] or [example.record["numbers"]]
        a, b, c = map(int, re.findall(r"\d+", left[0]))
        firsts = [max(x, y) + min(x, y) for x, y in ((a, b), (a, c), (b, c))]  # each pair is added first
        tried = [line for line in (*dead, last) if "+" in line.partition("=")[0]]
        assert [int(re.search(r"=(\d+)", line)[1]) for line in tried] == firsts[: len(tried)]
    with pytest.raises(UserError, match="words is set and kind is sudoku"):
        run(["make-puzzles", "--kind", "sudoku", "--words", "true", "--out", str(file)])


def test_the_path_has_the_smallest_largest_result_and_there_is_none_without_a_solution():
    numbers = torch.tensor([[2, 3, 50], [1, 1, 1]])
    path, solvable = puzzles._simplest(numbers, torch.tensor([56, 97]))
    assert solvable.tolist() == [True, False]
    assert puzzles._steps([2, 3, 50], path[0].item()) == ["3*2=6", "50+6=56"]


def test_five_numbers_take_four_steps():
    row = next(puzzles.countdowns(5, "train", 0))
    assert row["response"].count("=") == 4


def test_singles_leave_a_sudoku_with_one_solution():
    row = next(puzzles.sudokus(4, 4, "train", 1))
    digits = itertools.product("1234", repeat=4)
    lines = ["".join(line) for line in digits if len(set(line)) == 4]
    fitting = [
        [line for line in lines if all(c in ("0", d) for c, d in zip(row["prompt"][i : i + 4], line, strict=True))]
        for i in range(0, 16, 4)
    ]
    valid = [
        "".join(grid)
        for grid in itertools.product(*fitting)
        if all(len(set("".join(grid)[cell] for cell in group)) == 4 for group in puzzles._groups(4).tolist())
    ]
    assert valid == [row["response"]]


def test_a_sudoku_that_needs_guesses_is_not_solved_by_singles():
    solved = puzzles._solved_by_singles(torch.tensor([[0] * 16, list(map(int, "1234341221434300"))]))
    assert solved.tolist() == [False, True]
