"""Collision studies: closed forms against filters written here, and layers against closed forms.

What is derived in `inference.retrieval` is computed again here the textbook way, write by write, in
NumPy: ridge regression, the delta rule and its kin, one value at a time.
"""

import json
import math

import numpy as np
import pytest

from design_models import CATALOGUE, ModelError
from inference import retrieval
from inference.retrieval import TwoKeys
from recall import collide_command
from recall.cli import main
from recall.collisions import catalogue, two_keys
from recall.collisions.curves import Axis, Curve, Setting, together
from recall.collisions.kinds import Kind, kind
from recall.collisions.readings import Forgetting, Script, read

NOISE = 0.1
REPRESENTATIVES = (
    *("linear_attention", "retnet", "deltanet", "deltaproduct", "longhorn", "mesanet"),
    *("kalman_linear_attention", "kalman_delta_isotropic", "bayesian_layer"),
)
"""A layer of every kind, and those that are given their writes in another way."""

RNG = np.random.default_rng(3)


def unit(*shape):
    drawn = RNG.normal(size=shape)
    return drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)


TARGET, OTHER = unit(5), unit(5)
OVERLAP = float(TARGET @ OTHER)
CASES = [TwoKeys(m, n, OVERLAP, last) for m, n in ((1, 3), (4, 2)) for last in (False, True)]


def order(case):
    """Whether each write is the target's, and its key."""
    own = [True] * case.target + [False] * case.other
    own = np.array(own[::-1] if case.target_last else own)
    return own, np.where(own[:, None], TARGET, OTHER)


def split(case, weights):
    own, _ = order(case)
    return weights[own].sum(), weights[~own].sum()


# -- filters, write by write ---------------------------------------------------------------------


def ridge(keys, query, noises):
    return query @ keys.T @ np.linalg.inv(keys @ keys.T + np.diag(noises))


def corrected(keys, query, gains):
    """Weights of a delta rule: M (I − g k kᵀ) + g v kᵀ, with values that are unit vectors."""
    memory = np.zeros((len(keys), len(query)))
    for place, (key, gain) in enumerate(zip(keys, gains, strict=True)):
        value = np.eye(len(keys))[place]
        memory += gain * np.outer(value - memory @ key, key)
    return memory @ query


def entries(keys, query, noises):
    """Every entry a regression of its own, of values that are unit vectors."""
    precision, information = np.ones(len(query)), np.zeros((len(keys), len(query)))
    for place, (key, noise) in enumerate(zip(keys, noises, strict=True)):
        precision += key**2 / noise
        information[place] += key / noise
    return information / precision @ query


def reset_entries(keys, query, noises):
    memory = np.zeros((len(keys), len(query)))
    for place, (key, noise) in enumerate(zip(keys, noises, strict=True)):
        strength = 1 / (1 + noise)
        memory = memory * (1 - strength * key**2)
        memory[place] += strength * key
    return memory @ query


# -- closed forms --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_keys_weigh_what_filters_give_them_write_by_write(case):
    _, keys = order(case)
    count = len(keys)
    noises, reset = np.full(count, NOISE), retrieval.reset_gains(count, NOISE)
    counted, decay = retrieval.counted_gains(count, NOISE), 0.9
    ages = decay ** np.arange(count)[::-1] * (keys @ TARGET)
    expected = {
        "exact": (retrieval.exact_two_keys(case, NOISE), ridge(keys, TARGET, noises)),
        "reset": (retrieval.corrected_two_keys(case, reset), corrected(keys, TARGET, reset)),
        "counted": (retrieval.corrected_two_keys(case, counted), corrected(keys, TARGET, counted)),
        "superposed": (retrieval.superposed_two_keys(case, decay), ages),
        "entries": (
            retrieval.entry_two_keys(case, TARGET, OTHER, NOISE),
            entries(keys, TARGET, noises),
        ),
        "reset entries": (
            retrieval.reset_entry_two_keys(case, TARGET, OTHER, NOISE),
            reset_entries(keys, TARGET, noises),
        ),
    }
    for name, (form, weights) in expected.items():
        np.testing.assert_allclose(form, split(case, weights), rtol=1e-10, err_msg=name)


def test_repeated_writes_average_evidence_under_the_exact_filter_and_fade_under_a_reset_one():
    np.testing.assert_allclose(
        retrieval.gain_weights(retrieval.counted_gains(6, NOISE)), 1 / (6 + NOISE)
    )
    strength = 1 / (1 + NOISE)
    np.testing.assert_allclose(
        retrieval.gain_weights(retrieval.reset_gains(4, NOISE)),
        strength * (1 - strength) ** np.arange(4)[::-1],
    )


def test_confidence_and_overlap_have_the_weights_of_the_protocol():
    exact = retrieval.exact_two_keys(TwoKeys(5, 1, 1.0), NOISE)
    reset = retrieval.corrected_two_keys(TwoKeys(5, 1, 1.0), np.full(6, 0.5))
    assert exact.target == pytest.approx(0.820, abs=5e-4)
    assert reset.target == pytest.approx(0.484, abs=5e-4)
    late = TwoKeys(1, 1000, 0.7)
    np.testing.assert_allclose(retrieval.exact_two_keys(late, NOISE), (0.836, 0.115), atol=5e-4)
    reset = retrieval.corrected_two_keys(late, np.full(1001, 0.5))
    np.testing.assert_allclose(reset, (0.255, 0.700), atol=5e-4)


def test_writes_of_different_noise_weigh_what_filters_give_them():
    noises = np.array([0.1, 2.0, 0.3, 1.0])
    keys = np.tile(TARGET, (4, 1))
    for form, weights in (
        (retrieval.precision_weights(noises), ridge(keys, TARGET, noises)),
        (
            retrieval.gain_weights(1 / (1 + noises)),
            corrected(keys, TARGET, 1 / (1 + noises)),
        ),
        (retrieval.entry_weights(TARGET, noises), entries(keys, TARGET, noises)),
        (retrieval.reset_entry_weights(TARGET, noises), reset_entries(keys, TARGET, noises)),
    ):
        np.testing.assert_allclose(form, weights, rtol=1e-10)


def crowds(weigh, others, width, last, draws=3000):
    """Retention and intrusion over random keys, with their standard errors."""
    found = []
    for _ in range(draws):
        keys = unit(others + 1, width)
        target = others if last else 0
        weights = weigh(keys, keys[target])
        found.append((weights[target], np.sum(np.delete(weights, target) ** 2)))
    return np.mean(found, axis=0), np.std(found, axis=0) / math.sqrt(draws)


@pytest.mark.parametrize("last", [False, True])
def test_crowds_weigh_in_the_mean_what_filters_give_them(last):
    others, width = 6, 4
    reset = retrieval.reset_gains(others + 1, NOISE)
    counted = retrieval.counted_gains(others + 1, NOISE)
    noises = np.full(others + 1, NOISE)

    def delta(gains):
        own, rest = (gains[-1:], gains[:-1]) if last else (gains[:1], gains[1:])
        return retrieval.corrected_crowd(own, rest, width, target_last=last)

    ages = 0.9 ** np.arange(others + 1)[::-1]
    for form, weigh in (
        (delta(reset), lambda keys, query: corrected(keys, query, reset)),
        (delta(counted), lambda keys, query: corrected(keys, query, counted)),
        (
            retrieval.superposed_crowd(others, width, 0.9, target_last=last),
            lambda keys, query: ages * (keys @ query),
        ),
        (
            retrieval.reset_entry_crowd(others, width, NOISE, target_last=last),
            lambda keys, query: reset_entries(keys, query, noises),
        ),
    ):
        mean, error = crowds(weigh, others, width, last)
        assert np.all(np.abs(mean - form) < 4.5 * error + 1e-9), (mean, form, error)


@pytest.mark.parametrize("others", [8, 64, 256])
def test_the_exact_crowd_is_that_of_wide_keys(others):
    noises = np.full(others + 1, NOISE)
    mean, error = crowds(lambda keys, query: ridge(keys, query, noises), others, 64, False, 20)
    form = retrieval.exact_crowd(others, 64, NOISE)
    assert np.all(np.abs(mean - form) < 4.5 * error + 0.01 * np.array(form))


def test_the_exact_crowd_keeps_everything_while_it_is_small_and_a_share_once_it_is_large():
    assert retrieval.exact_crowd(1, 10_000, NOISE).retention == pytest.approx(1 / (1 + NOISE), 1e-3)
    assert retrieval.exact_crowd(100_000, 100, NOISE).retention == pytest.approx(1e-3, rel=5e-3)


def test_a_key_written_at_every_step_has_the_gains_of_its_scalar_filter():
    decay, drift, variance, gains = 0.9, 0.2, 1.0, []
    for _ in range(60):
        predicted = decay**2 * variance + drift
        gains.append(predicted / (predicted + NOISE))
        variance = predicted * NOISE / (predicted + NOISE)
    np.testing.assert_allclose(retrieval.forgetting_gains(60, decay, drift, NOISE), gains)
    assert retrieval.plateau_gain(decay, drift, NOISE) == pytest.approx(gains[-1])
    still = retrieval.forgetting_gains(5, 1.0, 0.0, NOISE)
    np.testing.assert_allclose(still, retrieval.counted_gains(5, NOISE))


@pytest.mark.parametrize("kept", [0.3, 0.8, 0.98])
@pytest.mark.parametrize("written", [1, 7])
def test_a_value_is_overwritten_where_the_closed_form_of_one_gain_says(kept, written):
    ones = np.ones(60)
    found = retrieval.writes_to_overwrite(ones, kept * ones, written)
    assert found == math.floor(-math.log(2 - kept**written) / math.log(kept)) + 1


def test_an_average_is_overwritten_by_one_write_more_than_it_has():
    gains = retrieval.counted_gains(30, NOISE)
    assert retrieval.writes_to_overwrite(gains, 1 - gains, 9) == 10
    assert retrieval.writes_to_overwrite(gains[:12], 1 - gains[:12], 9) is None


def test_the_error_of_a_read_out_is_that_of_values_drawn_from_the_model():
    keys, noises = unit(3, 5), np.array([0.1, 0.4, 1.0])
    weights, draws = np.array([0.5, -0.2, 0.9]), 200_000
    memory = RNG.normal(size=(draws, 5))
    values = memory @ keys.T + np.sqrt(noises) * RNG.normal(size=(draws, 3))
    errors = (values @ weights - memory @ TARGET) ** 2
    form = retrieval.read_error(weights, keys, TARGET, noises)
    assert form == pytest.approx(errors.mean(), abs=4.5 * errors.std() / math.sqrt(draws))


# -- layers --------------------------------------------------------------------------------------

SMALL = Setting(width=8, draws=2, seed=5)


@pytest.mark.parametrize("layer", REPRESENTATIVES)
def test_layers_weigh_two_keys_as_their_closed_form_says(layer):
    cases = [
        TwoKeys(m, n, c, last)
        for m, n, c in ((1, 3, 0.7), (3, 2, 1.0), (2, 0, 1.0))
        for last in (False, True)
    ]
    measured = two_keys.measure(layer, cases, SMALL)
    np.testing.assert_allclose(measured, two_keys.predict(layer, cases, SMALL), atol=1e-11)


def rotation_free(layer):
    return kind(layer) not in (Kind.ENTRIES, Kind.RESET_ENTRIES, Kind.DIAGONAL)


@pytest.mark.parametrize("layer", [name for name in REPRESENTATIVES if rotation_free(name)])
def test_orthogonal_keys_do_not_intrude(layer):
    cases = [TwoKeys(2, 3, 0.0, last) for last in (False, True)]
    measured = two_keys.measure(layer, cases, SMALL)
    np.testing.assert_allclose(measured[..., 1], 0, atol=1e-12)


def test_the_exact_filter_does_not_mind_the_order_and_a_reset_one_favours_what_comes_last():
    cases = [TwoKeys(1, 3, 0.7, last) for last in (False, True)]
    exact = two_keys.measure("bayesian_layer", cases, SMALL)
    np.testing.assert_allclose(exact[:, 0], exact[:, 1], atol=1e-12)
    early, late = two_keys.measure("deltanet", cases, SMALL).mean(axis=0)
    assert late[0] > early[0]
    assert late[1] < early[1]


def test_weights_are_what_a_layer_does_with_any_values():
    import jax
    import jax.numpy as jnp

    from layers import published_mixer

    keys, values, noise = unit(4, 2), RNG.normal(size=(4, 3)), np.full(4, NOISE)
    found = read("deltanet", Script(keys[None], noise[None], np.ones((1, 4), bool), keys[:1]))
    with jax.enable_x64(True):
        rng = jax.random.key(0)
        mixer = published_mixer("deltanet", 1, 1, key_width=2, value_width=3, rng=rng)
        inputs = {"key": keys, "value": values, "query": np.tile(keys[:1], (4, 1)), "noise": noise}
        inputs = {name: jnp.asarray(part) for name, part in inputs.items()}
        memory = mixer.memory
        prediction, _ = jax.jit(lambda u: memory(u, memory.init_state()))(inputs)
    np.testing.assert_allclose(found.weights[0] @ values, prediction.mean[-1], atol=1e-12)
    np.testing.assert_allclose(found.variance[0], prediction.variance[-1], atol=1e-12)


def test_what_is_not_written_takes_no_time():
    keys = unit(1, 4, 4)
    written = np.array([[True, False, True, False]])
    forgetting = Forgetting(0.9, 0.1)
    noise = np.full((1, 4), NOISE)
    some = read("gated_deltanet", Script(keys, noise, written, keys[:, 0]), forgetting)
    packed = Script(keys[:, [0, 2]], noise[:, :2], np.ones((1, 2), bool), keys[:, 0])
    all_of_them = read("gated_deltanet", packed, forgetting)
    np.testing.assert_allclose(some.weights[:, [0, 2]], all_of_them.weights, atol=1e-12)
    np.testing.assert_array_equal(some.weights[:, [1, 3]], 0)
    np.testing.assert_allclose(some.variance, all_of_them.variance)


# -- studies -------------------------------------------------------------------------------------

PAIR = ("deltanet", "bayesian_layer")


@pytest.fixture(scope="module")
def curves():
    """A crowd around narrow keys, of two layers."""
    return catalogue.run(["crowd"], PAIR, Setting(width=8, draws=16))


def the(curves, layer, **wanted):
    found = [
        curve
        for curve in curves
        if layer in curve.layers and all(getattr(curve, n) == v for n, v in wanted.items())
    ]
    assert len(found) == 1
    return found[0]


def test_crowds_are_as_predicted(curves):
    for curve in curves:
        if curve.claim == "wide keys":  # of keys narrower than the claim is for
            np.testing.assert_allclose(curve.measured, curve.predicted, rtol=0.2, atol=0.02)
        else:
            assert not curve.departs


@pytest.mark.parametrize("layer", ["deltanet", "kalman_linear_attention"])
def test_writes_that_differ_in_noise_are_weighed_as_predicted(layer):
    found = catalogue.run(["reliability"], [layer], SMALL)
    assert not [curve for curve in found if curve.departs]
    assert {curve.quantity for curve in found if curve.predicted is not None} == {
        *("clean share", "squared error", "squared error, not told")
    }


def test_the_exact_filter_says_how_wrong_it_is_and_the_reset_one_does_not(curves):
    said = {"study": "crowd", "order": "retroactive"}
    for layer, honest in (("bayesian_layer", True), ("deltanet", False)):
        error = the(curves, layer, quantity="squared error", **said).measured
        stated = the(curves, layer, quantity="stated variance", **said).measured
        assert np.allclose(error, stated, rtol=1e-9) == honest


def test_forgetting_overwrites_and_costs_what_is_left_alone():
    found = catalogue.run(["forgetting"], ["bayesian_layer"], SMALL)
    assert not [curve for curve in found if curve.departs]
    assert the(found, "bayesian_layer", quantity="writes to overwrite").measured == (2.0,)
    kept = the(found, "bayesian_layer", quantity="retention").measured
    assert kept[-1] == pytest.approx(0.98**32 / (1 + NOISE))


def test_layers_that_agree_share_their_curves():
    axis = Axis("study", "", "n", (1.0, 2.0))
    one = axis.curve("one", "gain", np.array([[1.0, 2.0]]))
    two = axis.curve("two", "gain", np.array([[1.0, 2.0]]))
    other = axis.curve("other", "gain", np.array([[1.0, 2.1]]))
    assert [curve.layers for curve in together([one, two, other])] == [("one", "two"), ("other",)]


@pytest.mark.parametrize(
    ("claim", "measured", "error", "departs"),
    [
        ("algebra", 1 + 1e-10, 1.0, False),
        ("algebra", 1 + 1e-6, 1.0, True),
        ("expectation", 1.4, 0.1, False),
        ("expectation", 1.6, 0.1, True),
        ("wide keys", 1.01, 0.0, False),
        ("wide keys", 1.03, 0.0, True),
    ],
)
def test_a_curve_departs_by_what_its_claim_does_not_allow(claim, measured, error, departs):
    curve = Curve("s", "", "q", "n", (1.0,), ("one",), (measured,), (error,), (1.0,), claim)
    assert curve.departs == departs


def test_every_layer_of_the_catalogue_has_a_kind():
    assert {kind(name) for name in CATALOGUE} == set(Kind)
    with pytest.raises(ModelError, match="delta"):
        kind("delta")


# -- the command ---------------------------------------------------------------------------------


def test_the_command_writes_tables_plots_and_a_record(tmp_path, capsys):
    record = tmp_path / "record.json"
    words = ["collide", "one_key", "--layers", "deltanet", "retnet", "--seeds", "2"]
    assert main([*words, "--out", str(tmp_path / "out"), "--json", str(record)]) == 0
    said = capsys.readouterr().out
    assert "all agree" in said
    assert "deltanet" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*("one_key.png", "record.json")}
    found = json.loads(record.read_text())
    assert found["command"].startswith("mbd collide one_key --layers deltanet")
    assert found["config"]["draws"] == 2
    assert {curve["study"] for curve in found["metrics"]} == {"one_key"}


def test_the_command_fails_where_a_layer_departs_from_its_closed_form(monkeypatch, capsys):
    form = two_keys.reset_gains
    monkeypatch.setattr(two_keys, "reset_gains", lambda *given: 0.95 * form(*given))
    assert main(["collide", "confidence", "--layers", "deltanet", "--seeds", "2"]) == 1
    assert "depart from their closed form" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["crowds"], "`STUDY` is 'crowds'; known: one_key, "),
        (["--layers", "delta"], "`--layers` is 'delta'; known: linear_attention, "),
    ],
)
def test_unknown_names_are_refused_with_those_that_are_known(words, says, capsys):
    assert main(["collide", *words]) == 2
    assert says in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["collide", "--out", str(tmp_path / "file")]) == 2
    assert "name another folder" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--seeds", "1"], ["--noise", "0"], ["--seed", "x"]])
def test_numbers_out_of_range_are_refused(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["collide", *words])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_names_on_the_command_line_are_those_of_the_studies():
    assert tuple(catalogue.STUDIES) == collide_command.STUDY_NAMES


def test_the_exact_filter_reads_the_first_of_a_crowd_as_it_reads_the_last(curves):
    first, last = (
        the(curves, "bayesian_layer", order=order, quantity="retention").measured
        for order in two_keys.ORDERS
    )
    np.testing.assert_allclose(first, last, atol=1e-10)
