import csv

import pytest
from test_registry import example

from dream_lightning.errors import UserError
from dream_lightning.tasks import grade_response, sudoku
from dream_lightning.tasks.sudoku import is_solution

PUZZLE, GRID = "3102200002100320", "3142243142131324"
ROWS = "3142\n2431\n4213\n1324"


SEPARATED = ["[[3,1,4,2],[2,4,3,1],[4,2,1,3],[1,3,2,4]]", "31|42 24|31 42|13 13|24"]
WRONG = ["", PUZZLE, GRID[:-1], GRID + "1", "4132" + GRID[4:], "x" + GRID, "1234" * 4, "９" * 16, "9" * 100_000]


def test_a_solution_keeps_the_clues_and_has_every_digit_in_every_row_column_and_box():
    assert all(is_solution(grid, PUZZLE) for grid in (GRID, ROWS, *SEPARATED))
    assert not any(is_solution(grid, PUZZLE) for grid in WRONG)
    assert not is_solution("1234234134124123", "0" * 16)  # only the boxes are wrong


NINE = [
    "123456789", "456789123", "789123456", "214365897", "365897214", "897214365", "531642978", "642978531",
    "978531642",
]  # fmt: skip


@pytest.mark.parametrize(
    "written",
    [
        "\n".join(NINE),
        "The solution:\n```text\n" + "\n".join(" ".join(row) for row in NINE) + "\n```",
        "\n------+-------+------\n".join(
            "\n".join(" | ".join(" ".join(row[i : i + 3]) for i in (0, 3, 6)) for row in NINE[b : b + 3])
            for b in (0, 3, 6)
        ),
        "| " + " |\n| ".join(" | ".join(row) for row in [NINE[0], ["---"] * 9, *NINE[1:]]) + " |",
        "".join(f"Row {n}: {row}\n" for n, row in enumerate(NINE, 1)),
        rf"\boxed{{{''.join(NINE)}}}",
    ],
)
def test_nine_by_nine_grids_are_read_as_models_write_them(written):
    puzzle = "".join(digit if (n * 7) % 5 < 2 else "0" for n, digit in enumerate("".join(NINE)))
    asked = example(puzzle, task="sudoku", puzzle=puzzle)
    assert grade_response(written, asked).correct
    other = "2" + puzzle[1:]  # another clue
    assert not grade_response(written, example(other, task="sudoku", puzzle=other)).correct


@pytest.mark.parametrize("puzzle", ["", "123", "5" * 16, "x" * 16])
def test_a_malformed_puzzle_is_an_error(puzzle):
    with pytest.raises(UserError, match=r"^rows.jsonl, row 1: the puzzle is .*, wanted 16 digits"):
        sudoku.reference(example(puzzle, Puzzle=puzzle))


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (rf"The first row is 3142. \boxed{{{ROWS}}}", GRID),
        (f"<answer>\n{ROWS}\n</answer>", GRID),
        (f"{PUZZLE} is solved by\n{ROWS}\nin 12 steps.", GRID),
        ("Row 1: 3 1 4 2\nRow 2: 2 4 3 1\nRow 3: 4 2 1 3\nRow 4: 1 3 2 4", GRID),
        ("1) 3142\n2) 2431\n3) 4213\n4) 1324", GRID),
        (f"The answer is:\n```\n{ROWS}\n```\nDone.", GRID),
        ("| 3 | 1 | 4 | 2 |\n|---|---|---|---|\n| 2 | 4 | 3 | 1 |\n| 4 | 2 | 1 | 3 |\n| 1 | 3 | 2 | 4 |", GRID),
        ("| | C1 | C2 | C3 | C4 |\n|---|---|\n| R1 | 3 | 1 | 4 | 2 |\n|R2|2|4|3|1|\n|R3|4|2|1|3|\n|R4|1|3|2|4|", GRID),
        ("+---+---+\n|3 1|4 2|\n|2 4|3 1|\n+---+---+\n|4 2|1 3|\n|1 3|2 4|\n+---+---+", GRID),
        ("┌───┬───┐\n│31 │ 42│\n│24 │ 31│\n├───┼───┤\n│42 │ 13│\n│13 │ 24│\n└───┴───┘", GRID),
        (
            r"\boxed{\begin{array}{|c|c|}\hline 3&1&4&2\\ \hline 2&4&3&1\\ 4&2&1&3\\ 1&3&2&4\\ \hline\end{array}}",
            GRID,
        ),
        (GRID[:-1], None),
    ],
)
def test_extract(response, answer):
    assert sudoku.extract(response) == answer


def test_real_rows_are_graded(shared):
    with shared("data/sudoku/4x4_test_sudoku.csv").open() as file:
        data = list(csv.DictReader(file))
    assert len(data) == 500
    for row, other in zip(data, data[1:] + data[:1], strict=True):
        asked = example(row["Puzzle"], reference=row["Solution"], task="sudoku", **row)
        assert grade_response(rf"\boxed{{{row['Solution']}}}", asked).correct
        assert not grade_response(row["Puzzle"], asked).correct
        assert grade_response(other["Solution"], asked).correct == (other["Solution"] == row["Solution"])
