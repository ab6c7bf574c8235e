"""The one error for what a user can correct, the two checks that raise it everywhere, and safe text for a terminal."""

import difflib
import math
import re
from abc import ABCMeta
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """A mistake that the user can correct. Its message says what was got, what was wanted, and what to do.

    The command line prints the message alone; everything else keeps its traceback.
    """


@contextmanager
def reading(path: str | Path, wanted: str, remedy: str = "download or copy it again") -> Iterator[None]:
    """Turn whatever a library raises while it reads a foreign file into one error that names the file.

    Raises:
        UserError: the file cannot be read, or is not what `wanted` says, such as "a JSON object".
    """
    try:
        # To open a pipe could wait forever. A string names a row or a source, and rows are many.
        if isinstance(path, Path) and path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is a pipe or device, wanted {wanted}: write its content to a file")
        yield
    except (UserError, MemoryError):
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; wanted {wanted}: {remedy}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path} is damaged or no {wanted.removeprefix('a ')} ({reason:.200}): {remedy}") from error


def check_range(
    name: str, value: float | None, *, least: float = -math.inf, most: float = math.inf, whole: bool = False
) -> None:
    """Raise UserError unless an option is None or a finite number with `least` ≤ value ≤ `most`; `whole`: an int."""
    if value is None:
        return
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if number and -math.inf < value < math.inf and least <= value <= most:
        return
    bounds = [f"at least {least}"] * (least > -math.inf) + [f"at most {most}"] * (most < math.inf)
    kind = "" if number and bounds else "a whole number " if whole else "a finite number "
    raise UserError(f"{name} is {value!r:.80}, wanted {kind + ' and '.join(bounds)}".rstrip())


_ALIASES = {"r": "rank", "lora_alpha": "alpha", "target_modules": "targets"}  # of PEFT → of LoraParams


def guess(word: str, known: Iterable[str]) -> str:
    """The known word that was probably meant, as a question with a space after it, or nothing."""
    known = list(known)
    alias = [_ALIASES[word]] if _ALIASES.get(word) in known else []
    return "".join(f"did you mean {name}? " for name in alias or difflib.get_close_matches(word, known, n=1))


class GuessKeywords(ABCMeta):
    """Metaclass: an unknown keyword argument raises a UserError with a guess."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        known = signature(cls.__init__).parameters
        unknown = [] if any(p.kind is Parameter.VAR_KEYWORD for p in known.values()) else kwargs.keys() - known.keys()
        for name in unknown:
            remedy = guess(name, known) or f"it has {', '.join(list(known)[1:])}"
            raise UserError(f"{cls.__name__} has no argument {name}: {remedy}".rstrip())
        return super().__call__(*args, **kwargs)

    @property
    def __signature__(cls) -> Signature:
        return Signature(list(signature(cls.__init__).parameters.values())[1:])


# Control characters but tab and newline, marks that change the direction of text, and halves of surrogate pairs.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Foreign text for a terminal: what would move the cursor, set the title or hide text becomes a visible sign."""
    return _UNSAFE.sub(lambda found: _sign(ord(found[0])), text)


def _sign(code: int) -> str:
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"
