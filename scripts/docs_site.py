"""Hooks of `mkdocs build`: pages that are made from the README, the notebook and the names that the package exports."""

import ast
import json
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
MODULES = ("", "diffusion", "model", "adapters", "data", "sampling", "answering", "tasks", "training", "evaluation")


def on_files(files, config):
    """Add the pages that are not files of docs/."""
    notebook = "notebooks/tour.ipynb"
    pages = {
        "index.md": (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "]("),
        "notebooks/tour.md": notebook_page((ROOT / "docs" / notebook).read_text(encoding="utf-8")),
        "api.md": "# API\n\n" + "\n".join(map(api_section, MODULES)),
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown, **_):
    """On the site, the README is the first page."""
    return markdown.replace("](../README.md", "](index.md")


def notebook_page(text: str) -> str:
    """The cells as Markdown, and a link to the notebook."""
    cells = [("".join(cell["source"]), cell["cell_type"] == "code") for cell in json.loads(text)["cells"]]
    parts = [f"```python\n{source}\n```" if is_code else source for source, is_code in cells]
    return "\n\n".join([parts[0], "[The notebook](tour.ipynb)", *parts[1:]])


def api_section(module: str) -> str:
    """A heading, and the docstring of everything in a module's `__all__`, or of its public functions and classes."""
    name = f"dream_lightning.{module}".rstrip(".")
    path = ROOT / name.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    exported = [
        element.value
        for node in tree.body
        if "__all__" in ast.unparse(node) and isinstance(node, ast.Assign | ast.AugAssign)
        for element in node.value.elts
    ]
    public = [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name[0] != "_"]
    lines = [f"## {name}", "", ast.get_docstring(tree) or "", ""]
    return "\n".join(lines + [f"::: {name}.{item}\n    options: {{heading_level: 3}}\n" for item in exported or public])
