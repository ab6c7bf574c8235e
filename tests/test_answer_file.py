"""AnswerFile: whatever is killed whenever, the finished file is the one of an undisturbed run."""

import itertools
import json
import random

import pytest
from kill_points import killed_before

from dream_lightning.answer_file import AnswerFile

QUESTIONS = {f"q{n}": n for n in range(40)}
LINES = [
    json.dumps({"id": name, "prediction": "½" * (number % 7)}, ensure_ascii=False) for name, number in QUESTIONS.items()
]
WHOLE = "".join(line + "\n" for line in LINES).encode()
SETTINGS = {"weights": "w", "sampling": {"steps": 4, "alg": "origin"}}


def tear(file, dice):
    """A kill leaves any beginning of the last line."""
    content = file.read_bytes()
    last = content[:-1].rfind(b"\n") + 1
    file.write_bytes(content[: dice.randint(last, len(content))])


def a_run(path, dice, ranks, *, stop_at):
    """Processes answer what is open, some in each other's way; True when all is answered."""
    first = AnswerFile(path)
    processes = [first, *(AnswerFile(path) for _ in range(ranks - 1))]
    done = first.open(QUESTIONS, SETTINGS)
    assert path.read_bytes() == WHOLE[: len(path.read_bytes())]
    left = [n for n in QUESTIONS.values() if n not in done]
    dice.shuffle(left)
    run = first.start_run(SETTINGS)
    for process in processes:
        process.join(run)
    for _ in range(stop_at):
        if not left:
            first.finish()
            first.close()
            return True
        rank, size = dice.randrange(ranks), dice.randint(1, 4)
        batch, left = left[:size], left[size:]
        processes[rank].append(rank, [(n, LINES[n]) for n in batch])
        if rank == 0:
            first.advance()
            assert path.read_bytes() == WHOLE[: len(path.read_bytes())]
    first.close()
    return False


@pytest.mark.parametrize("seed", range(30))
def test_any_kills_and_numbers_of_processes(tmp_path, seed):
    dice, path = random.Random(seed), tmp_path / "predictions.jsonl"
    for _ in range(100):
        if a_run(path, dice, dice.randint(1, 4), stop_at=dice.randint(0, 6)):
            break
        for file in tmp_path.iterdir():
            if not file.name.endswith(".json") and file.stat().st_size and dice.random() < 0.7:
                tear(file, dice)
        if dice.random() < 0.3:  # and somebody takes a line out
            lines = path.read_bytes().splitlines(keepends=True)
            path.write_bytes(b"".join(line for line in lines if line is not dice.choice(lines)))
    assert path.read_bytes() == WHOLE
    assert {file.name for file in tmp_path.iterdir()} == {path.name, path.name + ".settings.json"}


def started(path, numbers=QUESTIONS, **options):
    file = AnswerFile(path)
    done = file.open(numbers, SETTINGS, **options)
    file.join(file.start_run(SETTINGS))
    return file, done


def test_killed_before_any_change_of_a_file(tmp_path):
    """The kills above come between calls; these in the middle of each, resumed with a hole and torn lines to mend."""
    for moment in itertools.count():
        path = tmp_path / str(moment) / "predictions.jsonl"
        a_run(path, random.Random(moment), 3, stop_at=5)
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]) + b'{"id"')
        killed = [
            killed_before(moment, path.parent, lambda path=path: a_run(path, random.Random(1), 3, stop_at=99))
            for _ in range(2)
        ]
        assert a_run(path, random.Random(2), 2, stop_at=99)
        assert path.read_bytes() == WHOLE
        assert {file.name for file in path.parent.iterdir()} == {path.name, path.name + ".settings.json"}
        if not killed[0]:
            break
    assert moment > 20


def test_a_process_that_outlived_its_run_does_no_harm(tmp_path):
    path = tmp_path / "predictions.jsonl"
    old, _ = started(path)
    old.append(1, [(3, LINES[3])])
    old.close()  # the first process was killed, the second goes on
    new, done = started(path)
    assert done == {3}
    old.append(1, [(0, LINES[0]), (5, LINES[5])])
    new.append(0, [(n, LINES[n]) for n in QUESTIONS.values() if n != 3])
    new.advance()
    new.finish()
    old.append(1, [(6, LINES[6])])
    new.close()
    assert path.read_bytes() == WHOLE
    again, done = started(path)
    assert len(done) == 40
    again.close()


def test_parts_of_a_removed_file_are_not_taken_up(tmp_path):
    path = tmp_path / "predictions.jsonl"
    file, _ = started(path)
    file.append(0, [(3, LINES[3])])
    file.close()
    path.unlink()
    assert started(path)[1] == set()


def test_answers_that_wait_for_their_turn_are_guarded_like_the_file(tmp_path):
    path = tmp_path / "predictions.jsonl"
    file, _ = started(path)
    file.append(0, [(3, LINES[3])])
    file.close()
    assert path.stat().st_size == 0
    for other, told in (
        ({"weights": "other"}, r"\(weights differ\): weights was w and is other\."),
        ({"sampling": {"steps": 5, "alg": "origin"}}, r"\(sampling differ\): sampling\.steps was 4 and is 5\."),
        ({"precision": "32"}, r"\(precision differ\): precision was null and is 32\."),
    ):
        with pytest.raises(ValueError, match=told):
            AnswerFile(path).open(QUESTIONS, SETTINGS | other)
    with pytest.raises(ValueError, match="cannot leave questions out"):
        AnswerFile(path).open(None, SETTINGS)
    assert started(path, overwrite=True)[1] == set()


def test_a_number_that_comes_twice_is_an_error(tmp_path):
    file, _ = started(tmp_path / "predictions.jsonl")
    file.append(0, [(0, LINES[0])])
    file.advance()
    file.append(0, [(0, LINES[0])])
    with pytest.raises(ValueError, match="two questions have the sample id 0"):
        file.advance()


def test_a_strange_line_is_an_error_and_stays(tmp_path):
    path = tmp_path / "predictions.jsonl"
    file, _ = started(path)
    file.close()
    path.write_text(LINES[0] + "\nnot JSON\n")
    with pytest.raises(ValueError, match=r"answers none of the questions \(not JSON"):
        AnswerFile(path).open(QUESTIONS, SETTINGS)
    assert path.read_text() == LINES[0] + "\nnot JSON\n"
