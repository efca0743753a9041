"""What benchmarks/restoring.py says of finished runs: arms, best rates, gains on the control."""

import argparse
import json

import pytest

from benchmarks.restoring import _arms, _Known
from recall.language.run_files import RunFiles

FORMS, LENGTHS = ("single, noise", "single, prose"), (64, 128)
INSIDE = "restoration", "decay", "drift", "strength", "gain"


def request(out, **changes):
    asked = {
        "out": out,
        "arms": ["control", "student", "exact"],
        "restoration": [0.9, 0.99],
        "seeds": [0, 1],
        "forms": FORMS,
        "ask_lengths": LENGTHS,
    }
    return argparse.Namespace(**asked | changes)


def finished(folder, share, loss=3.0):
    """A run's folder with what it found, and its record."""
    folder.mkdir(parents=True)
    cells = {form: {str(length): {"found": share} for length in LENGTHS} for form in FORMS}
    heads = {number: [share] for number in (*INSIDE, "noise")}
    told = {"retrieval": cells, "inside_longest": {"2": heads}}
    (folder / "retrieval.json").write_text(json.dumps(told))
    tested = {"loss": loss, "perplexity": 10 * share, "retrieved": 0.5, "inside": {}}
    metrics = {"before": tested, "after": tested, "device_seconds": 2.0, "curve": []}
    return {"metrics": metrics, "device": "a card", "commit": "abc"}


def test_there_is_a_student_for_every_restoration_in_the_order_of_the_arms():
    arms = _arms(request(None))
    assert list(arms) == ["control", "student-0.9", "student-0.99", "exact"]
    assert arms["control"] == {"control": True}
    assert arms["student-0.99"] == {"restoration": 0.99}
    assert arms["exact"] == {"restoration": 1.0, "learned": False}


def test_gains_are_differences_seed_by_seed(tmp_path):
    known = _Known(request(tmp_path), 0.0)
    shares = {"control": (0.2, 0.4), "exact": (0.5, 0.6)}
    for arm, of_seeds in shares.items():
        for seed, share in enumerate(of_seeds):
            files = RunFiles(tmp_path / f"{arm}-{seed}")
            found = finished(files.path, share)
            known.add(f"{arm}-1-{seed}", found, files, arm, 1.0, seed)
    teacher = finished(tmp_path / "teacher", 0.1)
    teacher["metrics"] = {"held_out": {"perplexity": 7.0}, "device_seconds": 9.0}
    known.add("teacher", teacher, RunFiles(tmp_path / "teacher"))
    known.conclude({"control": 1.0, "exact": 1.0})
    results = json.loads((tmp_path / "summary.json").read_text())["metrics"]["results"]
    gain = results["gain_on_control"]["exact"]["single, prose"]["128"]
    assert gain["seeds"] == pytest.approx([0.3, 0.2])
    assert gain["mean"] == pytest.approx(0.25)
    assert results["perplexity"]["exact"]["mean"] == pytest.approx(5.5)
    assert results["perplexity"]["teacher"]["mean"] == 7.0
    assert results["retrieval"]["teacher"]["single, noise"]["64"]["mean"] == 0.1
    runs = json.loads((tmp_path / "summary.json").read_text())["metrics"]["runs"]
    assert runs["exact-1-1"]["inside_longest"] == {"2": {number: [0.6] for number in INSIDE}}
    assert (tmp_path / "retrieval.png").stat().st_size > 1000


def test_the_best_rate_is_that_of_least_loss_of_prose_and_needles(tmp_path):
    known = _Known(request(tmp_path), 0.0)
    for rate, loss in ((1e-4, 3.0), (4e-4, 2.0), (1e-3, 2.5)):
        files = RunFiles(tmp_path / f"{rate:g}")
        known.add(f"control-{rate:g}-0", finished(files.path, 0.5, loss), files, "control", rate, 0)
    assert known.best_rate("control", 0) == 4e-4
