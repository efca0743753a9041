"""A user's recurrence, end to end: a model that is not in the catalogue learns to recall."""

import ast
import importlib.util
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "new_recurrence.py"


def lines_of_code(path):
    """Lines that hold code: no blanks, comments or docstrings."""
    tree = ast.parse(path.read_text())
    lines = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt | ast.expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


@pytest.mark.nuts
@pytest.mark.slow
def test_a_new_recurrence_is_verified_compiled_and_trained(capsys):
    specification = importlib.util.spec_from_file_location("new_recurrence", EXAMPLE)
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    before, after = example.main()
    assert after < before / 2
    assert "compiled doubtful drift" in capsys.readouterr().out
