import json
import math
import os

import pytest

from dream_lightning import DreamModel
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
