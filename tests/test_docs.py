"""Docstring examples, and the list of pitfalls in tests/README.md."""

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

import rest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
ROW = re.compile(r"\| (\d+) \| .+? \| (.+) \|")
PITFALLS = {int(number): cell.split(", ") for number, cell in ROW.findall((TESTS / "README.md").read_text())}


def modules():
    """Names of all modules of the project."""
    files = [ROOT / "rest.py", ROOT / "train_small.py", *sorted((ROOT / "toy_tools").glob("[!_]*.py"))]
    return [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples_are_true(name):
    """Each `>>>` of the file is run and answers what stands below it."""
    if name == "toy_tools.trl_bridge":
        pytest.importorskip("trl")
    module = importlib.import_module(name)
    written = len(re.findall(r"^\s*>>> ", Path(module.__file__).read_text(), re.M))
    failed, attempted = doctest.testmod(module)
    assert failed == 0 and attempted == written
    assert written or module is not rest


def docstrings():
    """{"file.py::test": its docstring} of all tests."""
    found = {}
    for file in TESTS.glob("test_*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[f"{file.name}::{node.name}"] = ast.get_docstring(node) or ""
    return found


def test_every_pitfall_has_tests_that_exist():
    assert list(PITFALLS) == list(range(1, 14))
    missing = {name for names in PITFALLS.values() for name in names} - {f"`{x}`" for x in docstrings()}
    assert not missing


def test_the_list_knows_every_test_that_names_a_pitfall():
    """Who reads of a pitfall by its number finds the test in that row."""
    named = 0
    for test, text in docstrings().items():
        for numbers in re.findall(r"Pitfalls? (\d+(?:(?:, | and )\d+)*)", text):
            for number in map(int, re.findall(r"\d+", numbers)):
                assert f"`{test}`" in PITFALLS[number], (test, number)
                named += 1
    assert named >= 13
