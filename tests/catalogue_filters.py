"""The exact filters of the catalogue at its own widths, derived once for every test that asks."""

from functools import cache

import jax
import pytest

from design_models import CATALOGUE
from design_models.policy import Exact
from inference.derivation import draft
from inference.exact_filter import ExactFilter

NAMES = tuple(CATALOGUE)
EXACT_NAMES = tuple(n for n, entry in CATALOGUE.items() if isinstance(entry.policy, Exact))


@cache
def catalogue_filter(name: str) -> ExactFilter:
    """The filter of the entry's model, before any reduction."""
    with jax.enable_x64(True):
        return draft(CATALOGUE[name].model())


def by_name(names: tuple[str, ...]) -> pytest.MarkDecorator:
    """One test a name; tests of one name share a process, and with it the filter."""
    groups = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names]
    return pytest.mark.parametrize("name", groups)
