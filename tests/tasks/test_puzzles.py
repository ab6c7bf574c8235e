import csv
import itertools
import json

import pytest

from dream_lightning.tasks.puzzles import countdown_correct, sudoku_correct


@pytest.mark.parametrize(
    "expression",
    ["30+93-100", "30 + 93 - 100 = 23", "(30 − (100 - 93))", "-100+93+30", r"30 \times 93 / 93 - 7", "$93-(100-30)$"],
)
def test_countdown_right(expression):
    numbers = [30, 93, 93, 7] if "times" in expression else [30, 100, 93]
    assert countdown_correct(expression, numbers, 23)


def test_countdown_is_exact_in_fractions():
    assert countdown_correct("8/(3-8/3)", [8, 3, 8, 3], 24)
    assert not countdown_correct("8/3", [8, 3], 2)


@pytest.mark.parametrize(
    "expression",
    [
        "", "23", "30+93", "30+93-100+0", "30+30+93-100-30", "30+93-100=24", "30+93-100=23=23", "30*93-100",
        "100/(30-30)+93",
        "9**9**9**9", "30//1", "30+93-100 if 1 else 0", "__import__('os')", "(lambda: 23)()", "30.0+93-100",
        "0x1e+93-100",
        "030+93-100", "30+93-100)", "(" * 150, "-" * 190 + "1", "1+" * 5000 + "1", "9" * 5000, "30(93)", "30,93",
        "\x00", "[30]",
    ],
)  # fmt: skip
def test_countdown_wrong_or_hostile(expression):
    assert countdown_correct(expression, [30, 100, 93], 23) is False


def test_countdown_real_rows_have_a_solution_that_is_accepted(shared):
    lines = shared("data/countdown/countdown_cd3_test.jsonl").read_text().splitlines()[:60]
    solved = 0
    for row in map(json.loads, lines):
        numbers, target = [int(n) for n in row["input"].split(",")], int(row["output"])
        candidates = (
            form.format(a, x, b, y, c)
            for a, b, c in itertools.permutations(numbers)
            for x, y in itertools.product("+-*/", repeat=2)
            for form in ("({}{}{}){}{}", "{}{}({}{}{})")
        )
        solved += any(countdown_correct(candidate, numbers, target) for candidate in candidates)
        assert not countdown_correct(str(target), numbers, target)
    assert solved == len(lines)


PUZZLE, GRID = "3102200002100320", "3142243142131324"


@pytest.mark.parametrize(
    "grid", [GRID, "3142\n2431\n4213\n1324", "[[3,1,4,2],[2,4,3,1],[4,2,1,3],[1,3,2,4]]", "31|42 24|31 42|13 13|24"]
)
def test_sudoku_right(grid):
    assert sudoku_correct(grid, PUZZLE)


@pytest.mark.parametrize(
    "grid",
    [
        "",
        PUZZLE,
        GRID[:-1],
        GRID + "1",
        "4132" + GRID[4:],
        "x" + GRID,
        "1234" * 4,
        "1234341221434321",
        "９" * 16,
        "9" * 100_000,
    ],
)
def test_sudoku_wrong(grid):
    assert not sudoku_correct(grid, PUZZLE)


def test_sudoku_boxes_matter():
    latin = "1234234134124123"  # rows and columns right, boxes wrong
    assert not sudoku_correct(latin, "0" * 16)


@pytest.mark.parametrize("puzzle", ["", "123", "5" * 16, "x" * 16])
def test_a_malformed_puzzle_is_an_error(puzzle):
    with pytest.raises(ValueError, match="a puzzle is 16 digits"):
        sudoku_correct(GRID, puzzle)


def test_sudoku_real_rows(shared):
    with shared("data/sudoku/4x4_test_sudoku.csv").open() as file:
        data = list(csv.DictReader(file))
    assert len(data) == 500
    for row, other in zip(data, data[1:] + data[:1], strict=True):
        assert sudoku_correct(row["Solution"], row["Puzzle"])
        assert not sudoku_correct(row["Puzzle"], row["Puzzle"])
        assert sudoku_correct(other["Solution"], row["Puzzle"]) == (other["Solution"] == row["Solution"])
