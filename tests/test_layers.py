"""Who may import whom: rest.py is the ground, and no import runs downwards or hides in a function to
dodge a circle."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GROUND = ["rest"]
FIRST = ["fast", "chat", "schema", "show", "explain", "report", "benchmarks", "options", "runs",
         "lora"]  # on rest.py alone
SECOND = ["tools", "tasks", "data", "policy"]  # on the first storey and, in this order, on one another
TOP = ["train_small", "signal", "picture", "trl_bridge"]
OPTIONAL = {"bfcl_eval", "gguf", "accelerate", "peft", "matplotlib", "trl", "datasets", "pyarrow", "mpmath"}


def imports(file):
    """(project modules imported at the top, other top-level packages imported at the top, all imported
    in functions)."""
    tree = ast.parse(file.read_text())
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef)
              for node in ast.walk(function)}
    ours, others, late = set(), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
            if node.module == "toy_tools":
                names = [f"toy_tools.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            own = name.split(".")[1] if name.startswith("toy_tools.") else name
            if id(node) in inside:
                late.add(own.split(".")[0])
            elif name.startswith("toy_tools.") or name in ("rest", "train_small"):
                ours.add(own)
            else:
                others.add(name.split(".")[0])
    return ours, others, late


def file_of(module):
    return ROOT / (f"{module}.py" if module in ("rest", "train_small") else f"toy_tools/{module}.py")


def test_every_module_has_its_place():
    found = {file.stem for file in (ROOT / "toy_tools").glob("*.py")} - {"__init__"}
    assert found <= {*FIRST, *SECOND, *TOP}


def test_the_ground_needs_torch_and_the_standard_library():
    ours, others, late = imports(file_of("rest"))
    assert not ours and not late and others - {"torch"} <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("module", [*FIRST, *SECOND, *TOP])
def test_imports_run_upwards_only(module):
    if not file_of(module).exists():
        pytest.skip(f"there is no {module}")
    ours, _, late = imports(file_of(module))
    allowed = set(GROUND)
    if module in SECOND:
        allowed |= {*FIRST, *SECOND[:SECOND.index(module)]}
    if module in TOP:
        allowed |= {*FIRST, *SECOND}
    assert ours <= allowed
    assert not late & {*GROUND, *FIRST, *SECOND, *TOP, "toy_tools"}
