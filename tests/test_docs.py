"""Every example in a docstring and in the README runs."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import clae_fast

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(clae_fast.__path__, "clae_fast.")
    if m.name.rpartition(".")[2] not in ("__main__", "_C")
)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    module = importlib.import_module(name)
    names = {n: getattr(clae_fast, n) for n in clae_fast.__all__}
    extra = {**names, "torch": torch, "nn": nn, "clae_fast": clae_fast}
    result = doctest.testmod(module, extraglobs=extra)
    assert result.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    named = {t.name for m in MODULES for t in finder.find(importlib.import_module(m)) if t.examples}
    assert len(named) >= 10


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_readme_python():
    """The README's Python, top to bottom, in one namespace."""
    code = "\n".join(blocks("python"))
    assert "clae_step" in code
    exec(compile(code, "README.md", "exec"), {})


def test_readme_commands_are_those_of_ci():
    """.ci/run installs and tests as the README says."""
    commands = "\n".join(blocks("bash"))
    ci = (ROOT / ".ci" / "run").read_text()
    for command in ('pip install -e ".[test]"', "python -m pytest"):
        assert command in commands
        assert command in ci


def test_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"`clae_fast\.([a-zA-Z_]+)", text):
        assert hasattr(clae_fast, name), name
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / path).exists(), path


def test_readme_table_of_options():
    """Who takes what, by the signatures."""
    text = (ROOT / "README.md").read_text()
    found = dict(re.findall(r"^\| `(\w+_loss)` \| ((?:yes|no)\b.*) \|$", text, re.M))
    losses = {name for name in clae_fast.__all__ if name.endswith("_loss")}
    assert found.keys() == losses
    columns = ("ids", "sample_weight", "label_smoothing", "targets", "extra_negatives")
    assert f"| loss | ids | {' | '.join(f'`{c}`' for c in columns[1:])} |" in text
    for name, row in found.items():
        known = inspect.signature(getattr(clae_fast, name)).parameters
        has = [c in known or (c == "ids" and "query_ids" in known) for c in columns]
        assert [cell.startswith("yes") for cell in row.split(" | ")] == has, name
