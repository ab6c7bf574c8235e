"""Puzzles to train small models on from scratch: Countdown and Sudoku, with training and test parts that are disjoint.

Countdown as in Gandhi et al. 2024 (arXiv 2404.03683): numbers 1 to 99 and a target 10 to 100, solved in steps.

    86,28,13,31,96   →   86+28=114,31-13=18,114-18=96

Sudoku: the cells row by row, 0 = empty. Only naked and hidden singles are needed, which proves that the solution is
the only one.
"""

import itertools
import json
import random
import re
from collections.abc import Iterator
from hashlib import sha256
from math import isqrt
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from dream_lightning.atomic import write_texts
from dream_lightning.errors import UserError, check_range

Part = Literal["train", "test"]
_LOW, _HIGH = 10, 100  # targets
_TEST_SHARE = 100  # one puzzle in so many belongs to the test part, by its hash


def make_puzzles(parser: ArgumentParser, arguments: list[str]) -> None:
    """Write Countdown or Sudoku puzzles as JSON lines."""
    parser.add_function_arguments(write_puzzles)
    write_puzzles(**parser.parse_args(arguments).as_dict())


def write_puzzles(
    kind: Literal["countdown", "sudoku"],
    out: str,
    count: int = 1000,
    part: Part = "train",
    numbers: int = 4,
    side: Literal[4, 9] = 9,
    clues: int = 34,
    words: bool = False,
    seed: int = 0,
) -> None:
    """Write puzzles of one kind, each a record for `S1KDataModule`.

    Args:
        kind: countdown or sudoku.
        out: the file, JSON lines.
        count: number of puzzles, all different.
        part: train or test: no puzzle of one is ever in the other, whatever the seeds.
        numbers: numbers of a Countdown, 3 to 5.
        side: rows of a Sudoku.
        clues: fewest digits that a Sudoku keeps.
        words: a Countdown as a question with a reasoning trace, in the columns of s1K.
        seed: seed of the puzzles.
    """
    check_range("count", count, least=1, whole=True)
    check_range("numbers", numbers, least=3, most=5, whole=True)
    check_range("clues", clues, least=0, most=side * side, whole=True)
    if words and kind != "countdown":
        raise UserError(f"words is set and kind is {kind}, wanted countdown")
    rows = countdowns(numbers, part, seed) if kind == "countdown" else sudokus(side, clues, part, seed)
    seen: dict[str, str] = {}
    for row in rows:
        seen.setdefault(row["prompt"], json.dumps(in_words(row) if words else row))
        if len(seen) == count:
            break
    write_texts(Path(out).parent, {Path(out).name: "".join(f"{line}\n" for line in seen.values())})
    print(f"wrote {out}: {len(seen):,} puzzles")


def countdowns(numbers: int, part: Part, seed: int) -> Iterator[dict[str, Any]]:
    """Endless rows. The numbers are uniform, and so is the target among 10 to 100; those without a solution are drawn
    again. The solution is the one with the smallest intermediate results."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(seed)
    at_once = {3: 16384, 4: 4096, 5: 128}[numbers] * (16 if device.type == "cuda" else 1)
    while True:
        drawn = torch.randint(1, 100, (at_once, numbers), generator=generator)
        target = torch.randint(_LOW, _HIGH + 1, (at_once,), generator=generator)
        path, solvable = _simplest(drawn.to(device), target.to(device))
        for values, goal, number in zip(*(x[solvable].tolist() for x in (drawn, target, path)), strict=True):
            key = f"{sorted(values)} {goal}"
            if _is_test(key) == (part == "test"):
                written = ",".join(map(str, values))
                row = {"prompt": f"{written},{goal}", "response": ",".join(_steps(values, number))}
                yield row | {"task": "countdown-bare", "numbers": written, "target": goal}


def in_words(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `countdowns` as a question, a trace and an answer, in the columns of s1K.

    The trace states the steps of the solution until three numbers are left. From there it tries every first step in
    order, and what can follow, until the target is found: each line can be checked, and none is skipped.
    """
    left, target, steps = [int(n) for n in row["numbers"].split(",")], row["target"], row["response"].split(",")
    question = f"Use each of the numbers {_listed(left)} once, with + - * /, to make {target}."
    lines = []
    for done, step in enumerate(steps[:-2]):
        for used in re.findall(r"\d+", step.partition("=")[0]):
            left.remove(int(used))
        left.append(int(step.partition("=")[2]))
        lines.append(f"{'Then' if done else 'I begin with'} {step}. That leaves {_listed(left)}.")
    tried, found = _search(left, target)
    steps = [*steps[:-2], *found]
    answer = f"The steps are \\boxed{{{', '.join(steps)}}}."
    about = {"task": "countdown", "numbers": row["numbers"], "target": target, "solution": str(target)}
    return {"question": question, "thinking_trajectories": ["\n".join([*lines, *tried])], "attempt": answer} | about


def _search(numbers: list[int], target: int) -> tuple[list[str], list[str]]:
    """What is tried with three numbers, a line for each first step, and the two steps that make the target."""
    tried = []
    for (i, a), (j, b) in itertools.combinations(enumerate(numbers), 2):
        (other,) = (number for k, number in enumerate(numbers) if k not in (i, j))
        for first, result in filter(itemgetter(1), _results(a, b)):
            if "*" in first and result > target + other and result != target * other:
                tried.append(f"{first} is too large.")
                continue
            possible = filter(itemgetter(1), _results(result, other))
            seconds = [(step, made) for step, made in possible if "*" not in step or made <= target]
            hit = next((k for k, (_, made) in enumerate(seconds) if made == target), None)
            made = " or ".join(str(made) for _, made in seconds[: None if hit is None else hit + 1])
            tried.append(f"{first}, with {other} that makes {made}{'. No.' if hit is None else '. Yes!'}")
            if hit is not None:
                return tried, [first, seconds[hit][0]]
    raise AssertionError(f"{numbers} do not make {target}")


def _results(a: int, b: int) -> list[tuple[str, int]]:
    """The steps + - * / of two numbers and their results, as in `_simplest`; 0 for a step that is not allowed."""
    a, b = max(a, b), min(a, b)
    made = {"+": a + b, "-": a - b, "*": a * b, "/": 0 if a % b else a // b}
    return [(f"{a}{sign}{b}={result}", result) for sign, result in made.items()]


def _listed(numbers: list[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def _simplest(numbers: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] numbers and [N] targets → [N] path with the smallest largest intermediate result, [N] whether one exists.

    A path is a number in mixed radix: at each step, which pair of the remaining numbers and which of + − × ÷. Of two
    numbers the larger comes first; differences are above 0 and quotients whole.
    """
    left, largest = numbers[:, None, :], torch.zeros_like(numbers[:, :1])  # [N, paths, numbers left], [N, paths]
    while (count := left.shape[-1]) > 1:
        steps = []
        for i, j in itertools.combinations(range(count), 2):
            a, b = left[..., i].maximum(left[..., j]), left[..., i].minimum(left[..., j])
            others = left[..., [k for k in range(count) if k not in (i, j)]]
            quotient = torch.where(a % b.clamp(min=1) == 0, a // b.clamp(min=1), 0)
            for result in (a + b, a - b, a * b, quotient):
                valid = (b > 0) & (result > 0) & (result < 10_000)  # 0 marks a path that is not valid
                steps.append(torch.cat([others, torch.where(valid, result, 0)[..., None]], dim=-1))
        left = torch.stack(steps, dim=2).flatten(1, 2)
        largest = largest[:, :, None].expand(-1, -1, len(steps)).flatten(1, 2).maximum(left[..., -1])
    hit = left[..., 0] == target[:, None]
    found = torch.where(hit, largest, 1 << 30).min(dim=1)
    return found.indices.cpu(), (found.values < 1 << 30).cpu()


def _steps(numbers: list[int], path: int) -> list[str]:
    """The steps that a path of `_simplest` stands for, in words."""
    radices = [2 * n * (n - 1) for n in range(len(numbers), 1, -1)]  # pairs × 4 operations
    steps, left = [], numbers
    for pair, operation in (divmod(int(choice), 4) for choice in np.unravel_index(path, radices)):
        used = list(itertools.combinations(range(len(left)), 2))[pair]
        step, result = _results(*(left[k] for k in used))[operation]
        steps.append(step)
        left = [x for k, x in enumerate(left) if k not in used] + [result]
    return steps


def sudokus(side: int, clues: int, part: Part, seed: int) -> Iterator[dict[str, Any]]:
    """Endless rows: random full grids, from which cells are removed in random order while singles solve the rest."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    while True:
        grids = [_full_grid(side, rng) for _ in range(16384 if device.type == "cuda" else 64)]
        grids = [grid for grid in grids if _is_test(grid) == (part == "test")]
        if not grids:
            continue
        cells = torch.tensor([list(map(int, grid)) for grid in grids])
        removal = torch.rand(cells.shape, generator=generator).argsort(dim=1)
        puzzles = _removed(cells.to(device), removal.to(device), clues).tolist()
        for puzzle, grid in zip(puzzles, grids, strict=True):
            written = "".join(map(str, puzzle))
            yield {"prompt": written, "response": grid, "task": "sudoku-bare", "puzzle": written}


def _groups(side: int) -> Tensor:
    """[3 · side, side]: the cells of every row, column and box."""
    cells, box = torch.arange(side * side).view(side, side), isqrt(side)
    boxes = cells.view(box, box, box, box).transpose(1, 2).reshape(side, side)
    return torch.cat([cells, cells.T, boxes])


def _full_grid(side: int, rng: random.Random) -> str:
    """A random valid grid, by depth-first search from the cell with the fewest candidates."""
    box, grid = isqrt(side), [0] * side**2
    free = [(1 << side) - 1] * (3 * side)  # of every row, column and box the digits not yet used, as bits
    places = [
        (cell, row, side + column, 2 * side + row // box * box + column // box)
        for cell, (row, column) in enumerate(itertools.product(range(side), repeat=2))
    ]

    def candidates(place: tuple[int, ...]) -> int:
        return free[place[1]] & free[place[2]] & free[place[3]]

    def toggle(place: tuple[int, ...], digit: int) -> None:
        for group in place[1:]:
            free[group] ^= 1 << digit

    def fill(empty: list[tuple[int, ...]]) -> bool:
        if not empty:
            return True
        place = min(empty, key=lambda p: candidates(p).bit_count())
        digits = [d for d in range(side) if candidates(place) & 1 << d]
        for digit in rng.sample(digits, len(digits)):
            toggle(place, digit)
            grid[place[0]] = digit + 1
            if fill([p for p in empty if p is not place]):
                return True
            toggle(place, digit)
        return False

    fill(places)
    return "".join(map(str, grid))


def _removed(grids: Tensor, removal: Tensor, clues: int) -> Tensor:
    """[N, cells] full grids → puzzles that singles solve, with cells emptied in the order `removal` [N, cells]."""
    puzzles, row = grids.clone(), torch.arange(len(grids), device=grids.device)
    for cell in removal.T:
        tried = puzzles.clone()
        tried[row, cell] = 0
        keep = (puzzles > 0).sum(1) > clues
        puzzles = torch.where((keep & _solved_by_singles(tried))[:, None], tried, puzzles)
    return puzzles


def _solved_by_singles(puzzles: Tensor) -> Tensor:
    """[N, cells] → [N] bool: whether naked and hidden singles fill every cell."""
    side = isqrt(puzzles.shape[1])
    groups = _groups(side).to(puzzles.device)
    member = torch.zeros(len(groups), side**2, device=puzzles.device).scatter_(1, groups, 1.0)
    peers = (member.T @ member).clamp(max=1.0)  # [cells, cells], 1 = in one group
    known = torch.nn.functional.one_hot(puzzles, side + 1)[..., 1:].float()  # [N, cells, digits]
    for _ in range(side**2):
        open_cells = known.sum(2, keepdim=True) == 0
        candidates = (open_cells & (torch.einsum("cp,npd->ncd", peers, known) == 0)).float()
        naked = candidates * (candidates.sum(2, keepdim=True) == 1)
        once = (torch.einsum("gc,ncd->ngd", member, candidates) == 1).float()
        hidden = candidates * (torch.einsum("gc,ngd->ncd", member, once) > 0)
        found = (naked + hidden > 0).float()
        if not found.any():
            break
        known = known + found * (found.sum(2, keepdim=True) == 1)
    return known.sum((1, 2)) == side**2


def _is_test(key: str) -> bool:
    return int.from_bytes(sha256(key.encode()).digest()[:4]) % _TEST_SHARE == 0
