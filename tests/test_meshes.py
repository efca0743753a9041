"""Training over a mesh of devices, and in several processes, of which one may die."""

import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from test_training import tiny

from recall.layers_by_name import mixer_maker
from recall.mesh_sizes import read_sizes
from recall.meshes import gathered, make_mesh, placed
from recall.pieces import read_pieces, write_pieces
from recall.processes import LostProcess, run_here
from recall.run_folder import RunFolder
from recall.training import start, train

pytestmark = pytest.mark.xdist_group("meshes")

PLAN = tiny("linear_attention", steps=100)
MAKER = mixer_maker("linear_attention", 2)

on_four = pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")


def losses_on(mesh: str | None, runs, first: int, last: int, plan=PLAN):
    """The losses of every step on a mesh."""
    devices, found = None if mesh is None else make_mesh(read_sizes(mesh)), []
    runs = placed(runs, devices)
    train(plan, runs, first, last, lambda step, loss, *rest: found.append(loss.tolist()), devices)
    return found


@pytest.fixture(scope="module")
def alone():
    """Losses of one device, of 53 steps."""
    return losses_on(None, start(PLAN, MAKER), 0, 53)


@on_four
def test_a_mesh_trains_the_same_model(alone):
    found = losses_on("data=2,sequence=2", start(PLAN, MAKER), 0, 3)
    np.testing.assert_allclose(found, alone[:3], rtol=1e-4)


@on_four
@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("mesh", ["sequence=4", "data=2,heads=2", "heads=2,sequence=2"])
def test_a_mesh_trains_the_same_bayesian_layer(mesh):
    plan, maker = replace(PLAN, layer="bayesian_layer"), mixer_maker("bayesian_layer", 2)
    expected = losses_on(None, start(plan, maker), 0, 3, plan)
    found = losses_on(mesh, start(plan, maker), 0, 3, plan)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@on_four
def test_heads_are_split_and_pieces_hold_each_array_once(tmp_path):
    mesh = make_mesh(read_sizes("data=2,heads=2"))
    runs = start(PLAN, MAKER)
    split = placed(runs, mesh)
    weight = split.models.blocks[0].mixer.sources["key"].weight
    assert weight.sharding.shard_shape(weight.shape)[-1] == weight.shape[-1] // 2
    write_pieces(tmp_path, split)
    numbers = sum(leaf.nbytes for leaf in jax.tree.leaves(runs) if hasattr(leaf, "nbytes"))
    assert numbers < sum(file.stat().st_size for file in tmp_path.iterdir()) < 2 * numbers + 20_000
    for again in (read_pieces(tmp_path, runs), gathered(split, mesh)):
        for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(runs), strict=True):
            if hasattr(one, "nbytes"):
                np.testing.assert_array_equal(one, other)


def test_pieces_that_are_missing_or_of_another_model_are_refused(tmp_path):
    runs = start(PLAN, MAKER)
    with pytest.raises(ValueError, match="lacks pieces"):
        read_pieces(tmp_path, runs)
    write_pieces(
        tmp_path, jax.tree.map(lambda leaf: leaf[:, :1] if np.ndim(leaf) > 1 else leaf, runs)
    )
    with pytest.raises(ValueError, match="lacks pieces"):
        read_pieces(tmp_path, runs)


DYING = """
import os, signal, sys
import recall.run as run
from recall.cli import main
train = run.train

def dying(plan, runs, first, *rest):
    if first == 50 and os.environ["JAX_PROCESS_ID"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return train(plan, runs, first, *rest)

run.train, run._SECONDS_BETWEEN_SAVES = dying, 0.0
sys.exit(main(sys.argv[1:]))
"""


def test_a_process_that_dies_ends_the_run_which_goes_on_on_another_mesh(
    alone, tmp_path, capfd, monkeypatch
):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # one device each
    folder = RunFolder(tmp_path / "run")
    folder.create(PLAN)
    words = ["train", "associative_recall", "--out", str(folder.path), "--resume"]
    words += ["--mesh", "data=2", "--processes", "2"]
    with pytest.raises(LostProcess, match=r"process 1 of 2 ended \(signal 9\)"):
        run_here([sys.executable, "-c", DYING, *words], 2)
    said = capfd.readouterr().err
    if jax.default_backend() == "cpu":  # GPUs wait for the lost one's numbers until they are ended
        assert "so the run stopped; add --resume to go on after step 50" in said
    assert "Traceback" not in said
    runs, step, history = folder.load(start(PLAN, MAKER))
    assert step == 50
    assert len(list((folder.path / "checkpoint-50").iterdir())) == 2
    np.testing.assert_allclose(history["loss"], alone[:50], rtol=1e-3)
    other = "data=2,heads=2" if jax.device_count() >= 4 else "heads=2"
    np.testing.assert_allclose(losses_on(other, runs, 50, 53), alone[50:], rtol=1e-2)
