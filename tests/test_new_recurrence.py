"""A user's recurrence, end to end: a model that is not in the catalogue learns to recall."""

import ast
import importlib.util
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "new_recurrence.py"


def test_the_user_writes_less_than_sixty_lines():
    """Without blank lines, imports and docstrings."""
    tree = ast.parse(EXAMPLE.read_text())
    apart = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    ]
    left_out = {n for node in apart for n in range(node.lineno, (node.end_lineno or 0) + 1)}
    lines = enumerate(EXAMPLE.read_text().splitlines(), start=1)
    assert sum(bool(line.strip()) and n not in left_out for n, line in lines) < 60


@pytest.mark.exhaustive  # the notebook of a recurrence of one's own goes the same way
@pytest.mark.nuts
@pytest.mark.slow
@pytest.mark.xdist_group("kin")  # what verification derives of the catalogue is shared
def test_a_new_recurrence_is_verified_compiled_and_trained(capsys):
    specification = importlib.util.spec_from_file_location("new_recurrence", EXAMPLE)
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    losses = example.main()
    assert losses[-1] < losses[0] / 2
    assert "compiled doubtful drift" in capsys.readouterr().out
