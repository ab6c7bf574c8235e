"""Who may import whom (shared design: import direction)."""

import ast
from pathlib import Path

import pytest

import dream_lightning

ROOT = Path(dream_lightning.__file__).parent
LEAVES = {"data", "diffusion", "model", "adapters", "scoring", "callbacks"}
MAY_IMPORT = {
    "types": set(),
    **{leaf: {"types"} for leaf in LEAVES},
    "saving": set(),
    "callbacks": {"types", "saving"},
    "sampling": {"types", "diffusion"},
    "building": {"model", "adapters"},
    "optim": set(),
    "answering": {"types", "model", "sampling", "scoring"},
    "sharded": set(),
    "sums": {"types"},
    "strategy": {"sharded"},
    "module": {
        *("types", "answering", "building", "optim", "saving", "strategy", "sums"),
        *("model", "adapters", "diffusion", "sampling", "scoring"),
    },
    "watch": {"types", "data", "model", "sampling", "scoring", "building", "export"},
    "export": {"types", "model", "adapters", "module", "sharded"},
    "errors": set(),
    "plan": {"model", "adapters", "diffusion", "building", "optim", "strategy"},
    "cli": {"data", "module", "callbacks", "saving", "errors", "plan"},
    "__main__": {"cli"},
    "quiet": set(),
    "__init__": {"quiet", "types", *LEAVES, "sampling", "answering", "building", "module"},
}
FORBIDDEN = {
    "diffusion": {"transformers", "lightning", "peft"},
    "model": {"lightning", "peft", "bitsandbytes"},
    "sampling": {"transformers", "lightning"},
    "scoring": {"transformers", "lightning"},
}
ONLY_IN = {"math_verify": {"scoring/answers.py"}, "bitsandbytes": {"adapters/quantization.py", "optim.py"}}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {
                f"{node.module}.{a.name}" if node.module == "dream_lightning" else node.module for a in node.names
            }
    return names


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_one_way(file):
    part = file.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imported(file):
        top, _, rest = name.partition(".")
        if top == "dream_lightning" and (target := rest.split(".")[0]) and target != part:
            assert target in MAY_IMPORT[part], f"{part} may not import {name}"
        assert top not in FORBIDDEN.get(part, set()), f"{part} may not import {top}"
        assert top not in ONLY_IN or str(file.relative_to(ROOT)) in ONLY_IN[top], f"{top} in {file}"
        assert top not in {"scripts", "tests"}
