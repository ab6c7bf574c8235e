"""The rules of the house: who imports whom (per file, no circles), private interfaces, and the two roads."""

import ast
import re
from pathlib import Path

import pytest

import dream_lightning

ROOT = Path(dream_lightning.__file__).parent
NAME = "dream_lightning"

# Layers from the bottom to the top. A file imports from the layers that its own layer lists, and from its own folder.
BELOW = {
    "errors": set(),
    "batch": set(),
    "atomic": {"errors"},
    "commands": {"errors"},
    "reporting": set(),
    "data": {"errors", "batch", "atomic", "tasks"},  # a task words its prompts
    "diffusion": {"errors", "batch"},
    "model": {"errors", "batch"},
    "adapters": {"errors", "batch", "atomic", "model"},  # its reader of files
    "tasks": {"errors", "batch"},
    "sampling": {"errors", "batch", "diffusion"},
    "kernels": {"errors", "batch", "model", "diffusion", "sampling"},
    "answering": {"errors", "batch", "data", "sampling", "tasks"},
    "training": {
        *("errors", "batch", "atomic", "reporting"),
        *("data", "diffusion", "model", "adapters", "tasks", "sampling"),
    },
    "model_factory": {"errors", "batch", "diffusion", "model", "adapters", "kernels", "training"},
    "module": {
        *("errors", "batch", "diffusion", "model", "adapters", "tasks", "sampling", "training"),
        *("answering", "model_factory"),
    },
    "predict": {"errors", "batch", "atomic", "data", "tasks", "answering", "training"},
    "tokenizer_training": {"errors", "data", "model", "export"},
    "locate": {"errors", "adapters", "model", "training"},
    "export": {"errors", "atomic", "model", "adapters", "training", "locate"},
    "memory": {"errors", "reporting", "model", "adapters", "diffusion", "training", "model_factory"},
    "validation_cost": {"errors", "reporting", "memory", "model", "sampling"},
    "evaluation": {
        *("errors", "batch", "atomic", "data", "diffusion", "model", "sampling", "tasks", "answering", "predict"),
        *("export", "viewer", "training", "locate", "reporting"),
    },
    "hub": {"errors", "evaluation", "export", "locate"},
    "viewer": {
        *("errors", "batch", "adapters", "data", "model", "sampling", "tasks", "model_factory", "export"),
        *("diffusion", "locate"),
    },
    "experiments": {"errors", "atomic", "evaluation", "tasks"},
    "serving": {"errors", "batch", "data", "model", "sampling", "viewer", "locate"},
    "cli": {
        *(
            "errors",
            "atomic",
            "adapters",
            "sampling",
            "data",
            "diffusion",
            "model",
            "training",
            "module",
            "memory",
            "locate",
            "validation_cost",
            "evaluation",
            "experiments",
            "commands",
        )
    },
    "__main__": {"cli", "commands", "errors"},
    "__init__": {"data", "model", "adapters", "module", "sampling", "answering", "tasks"},
}
# The kernels are optional: of the core only these load them, by option.
LOADS_KERNELS = {"model_factory.py", "sampling/generate.py"}
FORBIDDEN = {
    "diffusion": {"transformers", "lightning", "peft"},
    "model": {"lightning", "peft", "bitsandbytes"},
    "sampling": {"transformers", "lightning"},
    "tasks": {"transformers", "lightning"},
}
ONLY_IN = {
    "math_verify": {"tasks/symbolic.py"},
    "lm_eval": {"evaluation/harness.py"},
    "bitsandbytes": {"adapters/quantized_linear.py"},
}
# Underscore attributes of other packages: torch's in kernels and model_factory, Lightning's in training.
# torch._scaled_mm: Dynamo of torch 2.11 cannot trace the public F.scaled_mm.
MAY_BE_PRIVATE = ("kernels/", "training/", "model_factory.py", "adapters/float8_linear.py")
# The one use elsewhere: only its version shows an in-place write into a batch, whose noise is made from its CPU copy.
KNOWN_PRIVATE = {"batch.py uses x._version"}


def files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def name_of(file: Path) -> str:
    parts = [NAME, *file.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file: Path, known: frozenset[str]) -> set[str]:
    """Dotted names of what a file imports anywhere in it; of this package the files themselves."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole in known else node.module)
    return names


def layer_of(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


def broken_imports() -> set[str]:
    known = frozenset(name_of(f) for f in files())
    broken = set()
    for file in files():
        place, layer = str(file.relative_to(ROOT)), layer_of(name_of(file))
        for name in imported(file, known):
            top = name.split(".")[0]
            if top == NAME and "." in name and (target := layer_of(name)) != layer:
                optional = target == "kernels" and place in LOADS_KERNELS
                if target not in BELOW.get(layer, set()) - {"kernels"} and not optional:
                    broken.add(f"{place} imports {name}")
            if top in FORBIDDEN.get(layer, set()) or top in {"scripts", "tests"}:
                broken.add(f"{place} imports {top}")
            if place not in ONLY_IN.get(top, {place}):
                broken.add(f"{place} imports {top}")
    return broken


def circles() -> set[str]:
    known = frozenset(name_of(f) for f in files())
    graph = {name_of(f): imported(f, known) & known - {NAME, name_of(f)} for f in files()}
    reach = {name: set(targets) for name, targets in graph.items()}
    for middle in graph:  # Floyd and Warshall
        for name in graph:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    return {f"{a} <-> {b}" for a in graph for b in reach[a] if a < b and a in reach[b]}


def private_uses() -> set[str]:
    uses = set()
    for file in files():
        place = str(file.relative_to(ROOT))
        if place.startswith(MAY_BE_PRIVATE):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
                if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                    uses.add(f"{place} uses {ast.unparse(node)}")
            elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith(NAME):
                if re.search(r"(^|\.)_[a-z]", node.module) or any(re.match(r"_[a-z]", a.name) for a in node.names):
                    uses.add(f"{place} imports from {node.module}")
            elif isinstance(node, ast.Import) and any(re.search(r"(^|\.)_[a-z]", a.name) for a in node.names):
                uses.add(f"{place} imports a private module")
    return uses ^ KNOWN_PRIVATE  # what is neither known nor stale


@pytest.mark.parametrize("rule", [broken_imports, circles, private_uses], ids=lambda r: r.__name__)
def test_the_house_keeps_its_rules(rule):
    assert sorted(rule()) == []


# The two roads, in reading order. Along the training road data flows from file to file, so a file may import those
# before it; along the answering road each file calls the next, so a file may import those after it.
ROADS = {
    "training": (
        *("data/sources", "data/schemas", "data/prompt_format", "data/tokenization", "data/packing"),
        *("diffusion/corruption", "model/modeling", "diffusion/weighting", "diffusion/objective", "module"),
    ),
    "answering": (
        *("answering", "data/prompt_format", "sampling/generate", "sampling/denoise", "sampling/unmasking"),
        "tasks/registry",
    ),
}


@pytest.mark.parametrize("road", ROADS)
def test_a_reader_of_a_road_never_turns_back(road):
    stations = [f"{NAME}.{station.replace('/', '.')}" for station in ROADS[road]]
    known = frozenset(name_of(f) for f in files())
    assert [s for s in stations if s not in known] == []
    imports = {name_of(f): imported(f, known) for f in files()}
    edges = [(i, j) for i, a in enumerate(stations) for j, b in enumerate(stations) if b in imports[a]]
    against = [(stations[i], stations[j]) for i, j in edges if (j > i) != (road == "answering")]
    assert len(edges) > 1
    assert against == []
