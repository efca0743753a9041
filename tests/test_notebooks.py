"""The notebooks run from top to bottom, their claims hold, and what is rendered is their source."""

import re
import runpy
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = ("calibrated", "abstain", "forgetting", "your_recurrence")
# What verification derives of the catalogue is shared with other tests that verify.
GROUP = {"your_recurrence": pytest.mark.xdist_group("kin")}
RUNS = [pytest.param(name, marks=GROUP.get(name, ())) for name in NAMES]


@pytest.fixture
def in_the_notebooks_folder(monkeypatch):
    """As a kernel would run there; settings that a notebook makes for good are undone."""
    monkeypatch.chdir(FOLDER)
    precise = jax.config.read("jax_enable_x64")
    with plt.rc_context():
        plt.switch_backend("agg")
        yield
        plt.close("all")
    jax.config.update("jax_enable_x64", precise)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_notebook_asserts_what_it_claims_and_labels_what_it_draws(
    name, in_the_notebooks_folder, monkeypatch
):
    shown = []

    def show():
        for number in plt.get_fignums():
            figure = plt.figure(number)
            titles = [axis.get_title(loc="left") or axis.get_title() for axis in figure.axes]
            assert all(titles)
            assert all(axis.get_xlabel() and axis.get_ylabel() for axis in figure.axes)
            shown.append(titles[0])
            plt.close(figure)

    monkeypatch.setattr(plt, "show", show)
    runpy.run_path(f"{name}.py")
    assert len(shown) >= 3
    assert "\nassert " in (FOLDER / f"{name}.py").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_rendered_is_the_source_as_it_is(name):
    """`make notebooks` was run after the last change."""
    cells = re.split(r"^# %%", (FOLDER / f"{name}.py").read_text(), flags=re.MULTILINE)[1:]
    code = [cell.strip() for cell in cells if not cell.startswith(" [markdown]")]
    rendered = (FOLDER / "rendered" / f"{name}.md").read_text()
    assert re.findall(r"^```python\n(.*?)\n```$", rendered, re.DOTALL | re.MULTILINE) == code
    words = [cell.split("\n", 1)[1] for cell in cells if cell.startswith(" [markdown]")]
    for line in re.findall(r"^# ?(.*)$", "\n".join(words), re.MULTILINE):
        assert line.replace("](../", "](../../") in rendered
    figures = [FOLDER / "rendered" / file for file in re.findall(r"\((\w+\.png)\)", rendered)]
    assert sum(file.stat().st_size for file in figures) + len(rendered) < 300_000
