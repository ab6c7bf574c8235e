"""What the program loads when it starts, also on a system that is not POSIX, and its help."""

import re
import subprocess
import sys

import pytest

from dream_lightning import cli
from dream_lightning.commands import COMMANDS, SUMMARIES

BLOCKED = ("fcntl", "grp", "pty", "pwd", "resource", "termios")  # not on Windows
PROGRAM = f"""
import os, sys
os.environ.pop("OMP_WAIT_POLICY", None)
sys.modules |= dict.fromkeys({BLOCKED})  # an import of them raises ImportError
sys.argv = ["dream-lightning", "--help"]
from dream_lightning.__main__ import main
main()
print(os.environ["OMP_WAIT_POLICY"], end=" ")
print(sorted({{"torch", "lightning", "transformers", "numpy", "yaml"}} & sys.modules.keys()))
import torch, lightning
del os.register_at_fork, os.getuid
before = set(sys.modules)
from dream_lightning import *
import dream_lightning.cli
print(sorted(name for name in sys.modules.keys() - before if name.count(".") <= 1))
print(DreamModule, LoraParams(rank=3).rank)
"""
HEAVY = {"torch._inductor.compile_fx", "torch._inductor.lowering", "bitsandbytes", "peft", "datasets", "pandas"}
HEAVY |= {"matplotlib.pyplot", "scipy.stats", "math_verify", "optuna", "tensorboard", "transformers.trainer_utils"}


def test_help_needs_no_torch_and_an_import_no_compiler():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    *printed, at_help, at_import, names = ended.stdout.splitlines()
    assert any(line.startswith("  fit ") for line in printed)
    assert at_help == "PASSIVE []"
    assert [name for name in HEAVY if f"'{name}'" in at_import] == []
    assert names == "<class 'dream_lightning.module.DreamModule'> 3"


@pytest.mark.parametrize("name", ["fit", *COMMANDS])
def test_every_option_is_described(name):
    """In whole sentences, without addresses of functions; and none is there that cannot work."""
    parser = cli.parser_of(name)
    described = {option: action.help for action in parser._actions for option in action.option_strings or [action.dest]}
    assert [option for option, text in described.items() if not text or re.match("(of|to|that) ", text)] == []
    assert not {"--optimizer", "--lr_scheduler"} & described.keys()
    text = parser.format_help()
    assert not re.search("0x[0-9a-f]{6}|:(meth|paramref|class):", text)
    if name == "fit":
        assert "--checkpoint.monitor" in text and "loss weight of a masked token" in text and "default: adamw" in text


def test_completion_knows_commands_and_options(monkeypatch, capsys):
    pytest.importorskip("shtab")
    monkeypatch.setattr(cli, "SUMMARIES", {name: SUMMARIES[name] for name in ("compare", "make-puzzles")})
    cli.run(["completion", "bash"])
    script = capsys.readouterr().out
    assert "-F _shtab_dream_lightning dream-lightning" in script and "--clues" in script and "make-puzzles" in script
