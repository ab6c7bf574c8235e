import inspect
import json
import math
import os
import re

import pytest

from dream_lightning import DreamModel, DreamModule, LoraParams, S1KDataModule, SamplingParams
from dream_lightning.errors import UserError, check_range, reading
from dream_lightning.export import model_from_checkpoint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "x.json cannot be read: No such file"),
        (b"{", "x.json is damaged or no JSON object .JSONDecodeError: Exp"),
    ],
)
def test_whatever_a_reader_raises_is_one_error_with_the_name_of_the_file(tmp_path, content, message):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"{message}.*copy it again"), reading(path, "a JSON object"):
        json.loads(path.read_bytes())


def test_an_error_of_our_own_and_an_interrupt_pass_unchanged():
    for error in (UserError("row 3"), KeyboardInterrupt(), MemoryError()):
        with pytest.raises(type(error)) as caught, reading("x", "a text"):
            raise error
        assert caught.value is error


@pytest.mark.parametrize("value", [0, -1, 11, math.nan, math.inf, -math.inf])
def test_a_number_out_of_range_is_refused_by_name(value):
    with pytest.raises(UserError, match=f"^steps is {value}, wanted at least 1 and at most 10$"):
        check_range("steps", value, least=1, most=10)
    for fits in (None, 1, 10):
        check_range("steps", fits, least=1, most=10)
    with pytest.raises(UserError, match=r"lr is nan, wanted a finite number$"):
        check_range("lr", math.nan)
    check_range("steps", 10**400, least=1, whole=True)


@pytest.mark.parametrize(("value", "whole"), [("4", False), (True, False), ([4], False), (4.0, True), (True, True)])
def test_what_is_no_number_is_refused_by_name(value, whole):
    with pytest.raises(UserError, match=f"^steps is .*, wanted a {'whole' if whole else 'finite'} number at least 1$"):
        check_range("steps", value, least=1, whole=whole)


def test_a_pipe_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is a pipe or device, wanted a checkpoint"):
        model_from_checkpoint(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is a pipe or device: name the folder"):
        DreamModel.from_pretrained(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DreamModule("x", lora={"ranks": 8}), "LoraParams has no argument ranks: did you mean rank?"),
        (lambda: LoraParams(lora_alpha=8), "LoraParams has no argument lora_alpha: did you mean alpha?"),
        (lambda: DreamModule("x", learning_rate=1e-3), "DreamModule has no argument learning_rate: it has pretrained,"),
        (lambda: DreamModule("x", weightng="cart"), "DreamModule has no argument weightng: did you mean weighting?"),
        (lambda: S1KDataModule("bundled", max_lenght=9), "has no argument max_lenght: did you mean max_length?"),
        (lambda: SamplingParams(step=4), "SamplingParams has no argument step: did you mean steps?"),
    ],
)
def test_a_misspelled_argument_gets_a_guess(make, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make()


def test_guesses_leave_signatures_and_subclasses_alone():
    class Mine(SamplingParams):
        def __init__(self, own, **others):
            super().__init__(**others)

    assert Mine(1, steps=3).steps == 3 and list(inspect.signature(Mine).parameters) == ["own", "others"]
    assert next(iter(inspect.signature(DreamModule).parameters)) == "pretrained"
