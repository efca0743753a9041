"""Training on recall: what is learned, what is resumed, how answers are scored."""

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_compiled import certify

from design_models import ModelError
from inference.derivation import draft
from layers.mixer import SequenceMixer
from recall.abstention import auroc, risk_by_coverage
from recall.cli import main
from recall.courses import Course, Segment, held_out, questions
from recall.disturbances import disturbed
from recall.evaluation import calibration_error, evaluate
from recall.layers_by_name import mixer_maker, mixer_of
from recall.models import token_model
from recall.mqar import UNLABELLED
from recall.new_model import write_new_model
from recall.plans import Plan, as_data, from_data, harder, small_plan, small_rows, zoology_plan
from recall.run import _that_see
from recall.run_folder import RunFolder
from recall.seeds import best_rate, over_seeds, shown
from recall.sweep import summary
from recall.tasks.associative import AssociativeRecall
from recall.tasks.catalogue import TASKS, Batch, draw
from recall.tasks.zoology import Zoology
from recall.training import start, train

ROWS = AssociativeRecall(codes=16, pairs=4)


def tiny(layer: str = "bayesian_layer", steps: int = 8, **changes) -> Plan:
    plan = small_plan("associative_recall", layer, ROWS, batch=16, steps=steps)
    return replace(plan, d_model=8, rates=(1e-2,), **changes)


def losses_of(plan: Plan, runs, first: int, last: int):
    found = []
    runs = train(plan, runs, first, last, lambda step, loss, *rest: found.append(loss.tolist()))
    return runs, found


# -- what is shown -------------------------------------------------------------------------------


def test_a_batch_is_the_same_whenever_it_is_asked_for():
    course = Course((Segment(ROWS, 0),), 4, steps=10)
    again = Course((Segment(ROWS, 0),), 4, steps=10)
    np.testing.assert_array_equal(course.questions(7).inputs, again.questions(7).inputs)
    assert not np.array_equal(course.questions(7).inputs, course.questions(8).inputs)


def test_segments_are_shown_whole_and_in_order_every_epoch():
    segments = (Segment(Zoology(64, 16, 2), 5), Segment(Zoology(64, 32, 4), 4))
    course = Course(segments, 2, epochs=3, seed=123)
    assert course.length == 15
    shapes = [course.questions(step).inputs.shape for step in range(5)]
    assert shapes == [(2, 16), (2, 16), (1, 16), (2, 32), (2, 32)]
    for step in range(5):
        np.testing.assert_array_equal(
            course.questions(step).inputs, course.questions(step + 10).inputs
        )
    assert [course.progress(step) for step in (0, 4, 5, 14)] == [0, 0, 1 / 3, 2 / 3]


def test_the_published_course_has_the_published_seeds_and_length():
    plan = zoology_plan("mqar", "deltanet")
    seeds = np.random.RandomState(123).randint(0, 2**31, size=5, dtype=np.int64)
    published = [843828734, 914636141, 1228959102, 1840268610, 974319580]
    assert seeds.tolist() == published
    tested = [2967327842, 2367878886, 3088727057, 3090095699, 4256823402, 3964712059, 3350193721]
    assert plan.course.test_seeds(7) == tested
    assert plan.course.length == 32 * (391 + 4 * 79)


def test_the_published_model_has_no_output_gate_and_gated_deltanet_wide_values():
    for layer, wide in (("deltanet", 1), ("gated_deltanet", 2), ("bayesian_layer", 1)):
        plan = zoology_plan("mqar", layer)
        mixer = mixer_maker(layer, 2, as_zoology=plan.as_zoology)(16, jax.random.key(0))
        assert isinstance(mixer, SequenceMixer)
        assert mixer.gate is None
        assert mixer.memory.inputs["value"] == (8 * wide,)
    mixer = mixer_maker("bayesian_layer", 2, as_zoology=True, expansion=3)(16, jax.random.key(0))
    assert isinstance(mixer, SequenceMixer)
    assert mixer.memory.inputs["value"] == (24,)
    assert plan.rates == pytest.approx([10**-3, 10**-2.5, 10**-2, 10**-1.5])
    assert (plan.dropout, plan.weight_decay) == (0.1, 0.1)


def test_rows_of_unequal_questions_are_filled_up_with_weight_zero():
    labels = np.full((2, 5), UNLABELLED)
    labels[0, [1, 3]], labels[1, 4] = [7, 8], 9
    asked = questions(Batch(np.zeros((2, 5), int), labels), 3)
    for row, expected in enumerate(({1: 7, 3: 8}, {4: 9})):
        told = zip(asked.places[row], asked.answers[row], asked.weights[row], strict=True)
        assert {place: answer for place, answer, weight in told if weight} == expected


@pytest.mark.parametrize("name", TASKS)
def test_rows_ask_no_more_than_they_say(name):
    """All shapes are those of the law, so that no draw needs a program of its own."""
    rows = small_rows(TASKS[name])
    asked = held_out(rows, 64, 3)
    labels = draw(rows, 64, 3, filler_seed=4 if isinstance(rows, Zoology) else None).labels
    assert asked.places.shape == (64, rows.most_asked)
    np.testing.assert_array_equal(asked.weights.sum(axis=1), (labels != UNLABELLED).sum(axis=1))


@pytest.mark.parametrize("name", TASKS)
def test_a_plan_is_made_again_from_its_data(name):
    plan = small_plan(name, "gla", TASKS[name].rows, batch=4, steps=3)
    again = from_data(json.loads(json.dumps(as_data(plan))))
    assert replace(again, course=plan.course) == plan
    assert as_data(again) == as_data(plan)
    for rows in harder(TASKS[name].rows).values():
        assert len(held_out(rows, 2, 0).inputs) == 2


def test_harder_rows_hold_twice_as_many_pairs_as_a_memory_has_keys():
    for rows in (Zoology(512, 64, 8), AssociativeRecall()):
        assert vars(harder(rows, width=32)["64 pairs, 2 x width"])["pairs"] == 64


# -- what is learned -----------------------------------------------------------------------------


def test_tokens_pass_short_convolutions_and_pairs_of_vectors_do_not():
    tokens, pairs = zoology_plan("mqar", "bayesian_layer"), tiny("bayesian_layer")
    for plan, convolved in ((tokens, True), (pairs, False)):
        mixer: Any = mixer_of(plan)(16, jax.random.key(0))
        assert (mixer.sources["key"].convolution is not None) == convolved


def test_projections_begin_small_as_upstreams_do():
    model = token_model(64, 64, mixer_maker("kda", 2), rng=jax.random.key(0))
    mixer = model.blocks[1].mixer
    decay = mixer.sources["log_decay"].projection
    matrices = mixer.out, mixer.gate.weight, mixer.sources["key"].weight, decay.down, decay.weight
    for matrix in matrices:
        assert np.std(matrix) == pytest.approx(0.02, rel=0.1)
    assert np.max(np.abs(mixer.sources["key"].convolution.taps)) > 0.4  # these are left alone


def test_a_decay_that_is_given_for_good_stays():
    plan = tiny("retnet", steps=1)
    runs = start(plan, mixer_maker("retnet", 2))
    before = jax.tree.map(np.array, eqx.filter(runs.models, eqx.is_array))
    after = train(plan, runs, 0, 1).models.blocks[0].mixer
    mixer = before.blocks[0].mixer
    given = mixer.sources["log_decay"].parameter
    np.testing.assert_array_equal(after.sources["log_decay"].parameter, given)
    assert np.abs(after.out - mixer.out).max() > 1e-4


def test_a_batch_with_fewer_rows_than_the_others_is_trained_on_those_alone():
    rows = Zoology(32, 16, 2)
    whole = Course((Segment(rows, 3),), 3, epochs=1)
    filled = replace(whole, batch=4)
    plan = replace(tiny("linear_attention"), course=whole, dropout=0.0)
    maker, found = mixer_maker("linear_attention", 2), []
    for course in (whole, filled):
        shown = replace(plan, course=course)
        train(shown, start(shown, maker), 0, 1, lambda *told: found.append(told))
    (_, *whole_told), (_, *filled_told) = found
    np.testing.assert_allclose(filled_told[0], whole_told[0], rtol=1e-5)
    assert filled_told[1:] == whole_told[1:]


def test_a_memory_learns_to_recall():
    rows = AssociativeRecall(codes=64, pairs=4)
    plan = small_plan("associative_recall", "deltanet", rows, batch=32, steps=100)
    plan = replace(plan, rates=(1e-2,))
    runs = train(plan, start(plan, mixer_maker("deltanet", 2)), 0, 100)
    (score,) = evaluate(runs.models, held_out(rows, 64, 2**31))
    assert score.accuracy > 0.7  # 0.89 here; 0.02 for a guess


def test_runs_side_by_side_are_those_of_each_alone():
    together = tiny("linear_attention", steps=4, seeds=(0, 3))
    maker = mixer_maker("linear_attention", 2)
    _, both = losses_of(together, start(together, maker), 0, 4)
    alone = replace(together, seeds=(3,))
    _, one = losses_of(alone, start(alone, maker), 0, 4)
    np.testing.assert_allclose([row[1] for row in both], [row[0] for row in one], rtol=1e-5)


def test_a_resumed_run_has_the_same_losses_to_the_last_bit(tmp_path):
    plan, folder = tiny("deltanet"), RunFolder(tmp_path / "run")
    maker = mixer_maker("deltanet", 2)
    _, whole = losses_of(plan, start(plan, maker), 0, 8)
    folder.create(plan)
    half, before = losses_of(plan, start(plan, maker), 0, 5)
    folder.save(half, 5, {"loss": before, "accuracy": before})
    loaded, step, history = folder.load(start(folder.plan(), maker))
    _, after = losses_of(folder.plan(), loaded, step, 8)
    assert history["loss"] + after == whole


# -- how answers are scored ----------------------------------------------------------------------


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    signal, wrong = rng.integers(0, 5, 40).astype(float), rng.random(40) < 0.4
    pairs = [
        (signal[i] > signal[j]) + 0.5 * (signal[i] == signal[j])
        for i, j in itertools.product(np.flatnonzero(wrong), np.flatnonzero(~wrong))
    ]
    assert auroc(signal, wrong) == pytest.approx(np.mean(pairs))
    assert np.isnan(auroc(signal, np.zeros(40, bool)))


def test_calibration_error_is_the_gap_of_confidence_and_accuracy():
    confidence = np.repeat([0.05, 0.95], 100)
    right = np.r_[np.arange(100) < 5, np.arange(100) < 75]
    assert calibration_error(confidence, right) == pytest.approx(0.1)


def test_scores_do_not_depend_on_how_many_rows_are_scored_at_once(monkeypatch):
    plan = tiny(steps=1)
    models = start(plan, mixer_maker("bayesian_layer", 2)).models
    asked = held_out(ROWS, 9, 5)
    whole = evaluate(models, asked)
    monkeypatch.setattr("recall.evaluation._NUMBERS_AT_ONCE", 4 * 16 * 4)
    assert [replace(score, memory=None) for score in evaluate(models, asked)] == [
        replace(score, memory=None) for score in whole
    ]
    assert not np.isnan(whole[0].variance_auroc)


def test_a_memory_is_judged_by_the_values_that_it_would_be_shown():
    """Against the same layer decoding, token by token, with and without the answer."""
    models = start(tiny(steps=1), mixer_maker("bayesian_layer", 2)).models
    asked = held_out(ROWS, 1, 5)
    found = evaluate(models, asked)[0].memory
    model = jax.tree.map(lambda leaf: leaf[0] if eqx.is_array(leaf) else leaf, models)
    block, inputs = model.blocks[0], asked.inputs[0]
    step = eqx.filter_jit(block.mixer.predict_step)
    state, said = block.mixer.init_state(), []
    for place, pair in enumerate(inputs):
        if place in asked.places[0]:
            answer = asked.answers[0][list(asked.places[0]).index(place)]
            told = block.norm(model.embedding(jnp.array([[pair[0], answer]]))[0])
            source = block.mixer.sources["value"]
            truth = source(told[None], state.past["value"], None, None)[0][0]
            x = block.norm(model.embedding(jnp.array(pair)[None])[0])
            _, prediction, _ = step(x, state)
            deviation = np.sqrt(prediction.value_variance)[:, None]
            said.append((np.asarray(truth) - np.asarray(prediction.mean)) / deviation)
        x = block.norm(model.embedding(jnp.array(pair)[None])[0])
        _, _, state = step(x, state)
    white = np.stack(said)
    assert found.error_ratio == pytest.approx(np.mean(white**2), rel=1e-4)
    assert found.coverage == pytest.approx(np.mean(np.abs(white) < 1.6449), abs=1e-9)


def test_memories_that_predict_no_values_are_not_judged():
    asked = held_out(ROWS, 2, 5)
    for layer in ("linear_attention", "attention"):
        models = start(tiny(layer, steps=1), mixer_maker(layer, 2)).models
        assert evaluate(models, asked)[0].memory is None


def test_risk_is_the_loss_of_the_answers_that_are_let_through():
    signal, loss = np.array([3.0, 1.0, 2.0, 1.0]), np.array([1.0, 0.0, 0.5, 1.0])
    expected = [0.5, 0.5, 1.5 / 3, 2.5 / 4]
    np.testing.assert_allclose(risk_by_coverage(signal, loss), expected)


def test_overlap_is_seen_in_the_keys_of_a_trained_model():
    plan = tiny("deltanet", steps=1)
    models = start(plan, mixer_maker("deltanet", 2)).models
    seen = _that_see(models, replace(ROWS, overlap=0.9)).embedding(jnp.array([[0, -1], [1, -1]]))
    keys = np.asarray(seen)[:, :8]
    assert keys[0] @ keys[1] == pytest.approx(0.9, abs=0.1)


def test_disturbed_tokens_are_keys_with_a_cosine_and_noisy_values():
    plan = small_plan("mqar", "linear_attention", Zoology(32, 16, 4), batch=2, steps=1)
    models = start(replace(plan, d_model=64), mixer_maker("linear_attention", 2)).models
    seen = {
        name: jax.tree.map(lambda leaf: leaf[0], eqx.filter(changed.embedding, eqx.is_array))
        for name, changed in disturbed(models, 1, Zoology(32, 16, 4)).items()
    }
    tokens = jnp.arange(32)
    before = seen["overlap 0.9 of keys"].embedding(tokens)
    overlapping = seen["overlap 0.9 of keys"](tokens)
    lengths = np.linalg.norm(overlapping, axis=1)
    np.testing.assert_allclose(lengths, np.linalg.norm(before, axis=1), rtol=1e-5)
    directions = np.asarray(overlapping / lengths[:, None])[1:16]
    cosines = (directions @ directions.T)[np.triu_indices(15, 1)]
    assert np.mean(cosines) == pytest.approx(0.9, abs=0.02)
    noisy = np.asarray(seen["noise 0.5 on values"](tokens) - before)
    np.testing.assert_array_equal(noisy[:16], 0)
    shares = np.linalg.norm(noisy[16:], axis=1) / np.linalg.norm(before[16:], axis=1)
    assert np.mean(shares) == pytest.approx(0.5, rel=0.1)


# -- the commands --------------------------------------------------------------------------------

TRAINED = [
    ("mqar", "linear_attention", ["--vocab", "32", "--length", "16", "--pairs", "2"]),
    ("in_context_recall", "attention", ["--vocab", "8", "--length", "12"]),
    ("collision", "gated_deltanet", ["--codes", "8", "--pairs", "2"]),
]


@pytest.mark.parametrize(("task", "layer", "wish"), TRAINED, ids=[case[0] for case in TRAINED])
def test_a_run_is_trained_recorded_plotted_and_evaluated(task, layer, wish, tmp_path, capsys):
    out = tmp_path / "run"
    small = ["--d-model", "8", "--steps", "3", "--batch", "4", *wish]
    assert main(["train", task, "--layer", layer, "--out", str(out), *small]) == 0
    record = json.loads((out / "record.json").read_text())
    assert record["config"]["layer"] == layer
    assert set(record["metrics"]["test"]) == set(record["config"]["tests"])
    assert {path.name for path in out.iterdir()} >= {"learning_curve.png", "accuracy_by_load.png"}
    assert main(["train", task, "--out", str(out), "--resume"]) == 0
    again = json.loads((out / "record.json").read_text())
    assert again["metrics"]["test"] == record["metrics"]["test"]
    told = tmp_path / "eval.json"
    assert main(["eval", str(out), "--beyond", "--examples", "8", "--json", str(told)]) == 0
    metrics = json.loads(told.read_text())["metrics"]
    scores, rate = metrics["scores"], metrics["rate"]
    assert rate in record["config"]["rates"]
    judged = [score["memory"] is not None for found in scores.values() for score in found]
    assert judged == [task == "collision"] * len(judged)
    assert "as in training" in scores
    assert len(scores) > 4
    assert any(name.startswith("noise 0.5") for name in scores)
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_model_of_ones_own_is_trained_and_evaluated(tmp_path, monkeypatch, capsys):
    path, out = tmp_path / "my_memory.py", tmp_path / "run"
    write_new_model(path)
    monkeypatch.setattr("inference.verify", lambda model, **named: certify(draft(model)))
    small = ["--d-model", "8", "--steps", "2", "--batch", "4", "--codes", "8", "--pairs", "1"]
    layer = f"{path}:model:wide"
    asked = ["associative_recall", "--layer", layer, "--out", str(out), *small]
    assert main(["train", *asked]) == 0
    assert json.loads((out / "record.json").read_text())["config"]["layer"] == layer
    assert main(["eval", str(out)]) == 0
    assert "my_memory.py:model:wide" in capsys.readouterr().out
    mixer: Any = mixer_maker(layer, 1)(8, jax.random.key(0))
    assert mixer.sources["key"].shape == (32,)


@pytest.mark.exhaustive
def test_a_model_too_wide_to_derive_asks_for_its_narrow_one(tmp_path):
    path = tmp_path / "my_memory.py"
    write_new_model(path)
    with pytest.raises(ModelError, match=r"follows its narrow one, as in FILE\.py:OBJECT:WIDE"):
        mixer_maker(f"{path}:wide", 1)


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        (["mqar"], "`--layer` is missing"),
        (["mqar", "--layer", "mamba9"], "`--layer` is 'mamba9'; it must be one of"),
        (["mqar", "--layer", "gla", "--heads", "3"], "`--d-model` is 64, no multiple of"),
        (["mqar", "--layer", "gla", "--mesh", "data=99"], "`--mesh` is data=99, 99 devices; JAX"),
        (["mqar", "--layer", "gla", "--mesh", "heads=4"], "`--heads` is 2, no multiple of"),
        (["mqar", "--layer", "attention", "--mesh", "sequence=2"], "leave out sequence="),
        (["mqar", "--layer", "mesanet", "--mesh", "sequence=2"], "leave out sequence="),
        (["mqar", "--resume"], "holds no run; start one"),
        (["collision", "--layer", "gla", "--preset", "zoology"], "is the protocol of mqar"),
        (["mqar", "--layer", "gla", "--preset", "zoology", "--steps", "3"], "leave out `--steps`"),
        (["mqar", "--layer", "gla", "--copied", "3"], "mqar has no `--copied`"),
    ],
)
def test_a_run_that_makes_no_sense_is_refused_and_leaves_nothing(wish, says, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", *wish, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_folder_that_holds_a_run_is_kept(tmp_path, capsys):
    RunFolder(tmp_path).create(tiny())
    with pytest.raises(ModelError, match="holds a run; add --resume"):
        RunFolder(tmp_path).create(tiny())
    (tmp_path / "checkpoint.json").write_bytes(b"nonsense")
    assert main(["train", "associative_recall", "--out", str(tmp_path), "--resume"]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main(["train", "mqar", "--out", str(tmp_path), "--resume"]) == 2
    assert "holds a run of associative_recall" in capsys.readouterr().err


SWEEP = """
task = "associative_recall"
layers = ["linear_attention", "deltanet"]
widths = [8]
rates = [1e-3, 1e-2]
seeds = [0, 1]
steps = 3
batch = 4
[rows]
codes = 8
pairs = 2
"""


def test_a_sweep_trains_what_is_not_trained_yet(tmp_path, capsys):
    path, out, told = tmp_path / "sweep.toml", tmp_path / "runs", tmp_path / "told.json"
    path.write_text(SWEEP)
    assert main(["sweep", str(path), "--out", str(out), "--minutes", "1e-9"]) == 0
    assert "the same command goes on" in capsys.readouterr().out
    assert main(["sweep", str(path), "--out", str(out), "--json", str(told)]) == 0
    lines = json.loads(told.read_text())
    assert [line["layer"] for line in lines] == ["linear_attention", "deltanet"]
    assert {len(part) for line in lines for part in line["accuracy"].values()} == {2}
    times = {file: file.stat().st_mtime_ns for file in out.rglob("record.json")}
    assert len(times) == 2
    assert main(["sweep", str(path), "--out", str(out)]) == 0
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert "best rate" in capsys.readouterr().out


def test_the_rate_is_chosen_on_validation_rows():
    plan = tiny(seeds=(0, 1))
    plan = replace(plan, rates=(1e-3, 1e-2))
    scores = {"validation": [0.1, 0.2, 0.9, 0.8], "test": [1.0, 1.0, 0.4, 0.5]}
    metrics = {
        part: {"rows": [{"accuracy": accuracy, "calibration_error": 0.1} for accuracy in found]}
        for part, found in scores.items()
    }
    line = summary(plan, metrics | {"parameters": 1, "tokens_per_second": 1.0})
    assert (line.rate, line.accuracy) == (1e-2, {"rows": [0.4, 0.5]})


@pytest.mark.parametrize(("errors", "best"), [((0.1, 0.2, 0.3), 1e-2), ((0.3, 0.2, 0.1), 1e-1)])
def test_of_rates_that_are_right_equally_often_the_surest_is_chosen(errors, best):
    plan = replace(tiny(), rates=(1e-3, 1e-2, 1e-1), seeds=(0,))
    scores = [
        {"accuracy": accuracy, "calibration_error": error}
        for accuracy, error in zip((0.9, 1.0, 1.0), errors, strict=True)
    ]
    assert best_rate(plan, {"rows": scores}) == best


def test_seeds_together_are_their_mean_and_its_interval():
    """Student's 97.5 % point of two degrees of freedom is 4.303."""
    mean, half = over_seeds([1.0, 2.0, 3.0, math.nan])
    assert (mean, half) == pytest.approx((2.0, 4.303 / math.sqrt(3)), rel=1e-3)
    assert [shown(found) for found in ([0.5], [math.nan])] == ["0.500", "–"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("task =", "is not TOML"),
        ('layers = ["gla"]', "`task` is missing"),
        ('task = "mqr"\nlayers = ["gla"]', "`task` is 'mqr'"),
        ('task = "mqar"\nlayers = []', "`layers` is []"),
        ('task = "mqar"\nlayers = ["gla"]\nrate = 1', "`rate` is unknown"),
        ('task = "mqar"\nlayers = ["gla"]\npreset = "big"', "`preset` is 'big'"),
        ('task = "mqar"\nlayers = ["gla"]\npreset = "zoology"\nsteps = 3', "leave out `steps`"),
        ('task = "mqar"\nlayers = ["gla"]\nepochs = 3', "`epochs` is for the preset zoology"),
        ('task = "mqar"\nlayers = ["gla"]\n[rows]\ncopied = 3', "have no `copied`"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(text, says, tmp_path, capsys):
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    assert main(["sweep", str(path), "--out", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
