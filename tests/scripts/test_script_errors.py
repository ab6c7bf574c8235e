"""Every script tells a user's mistake in one message."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "scripts").glob("*.py"))


@pytest.mark.parametrize("script", [s for s in SCRIPTS if "auto_cli(" in s.read_text()], ids=lambda script: script.stem)
def test_options_are_read_under_readable_errors(script):
    lines = [line.strip() for line in script.read_text().splitlines()]
    assert lines[lines.index("auto_cli(main, as_positional=False)") - 1] == "with readable_errors():"


def test_an_error_that_the_script_itself_raises_is_one_message(monkeypatch, capsys):
    (show,) = (script for script in SCRIPTS if script.stem == "show")
    monkeypatch.delenv("DREAM_TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "argv", [str(show), "--source=bundled", "--tokenizer=bytes", "--row=0"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(show), run_name="__main__")
    assert exit_.value.code == 1
    said = capsys.readouterr().err
    assert "error: row is 0, bundled has 1 to 20000" in said and "Traceback" not in said
