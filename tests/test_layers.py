"""Sequence mixers: what they say in full, token by token, in packed documents and beside padding.

The oracle of every full pass is decoding: one step a token, without chunks, masks or segments.
"""

from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jla.ops import linear_attention

from design_models import CATALOGUE
from layers import BayesianLayer, LanguageModel, parameter_count, published_mixer

pytestmark = pytest.mark.xdist_group("layers")

D_MODEL, HEADS, TIME = 16, 4, 16
EPS = float(jnp.finfo(jnp.float32).eps)


def published(name, **options):
    return lambda: published_mixer(name, D_MODEL, HEADS, **options, rng=jax.random.key(0))


def bayesian(**options):
    return lambda: BayesianLayer(D_MODEL, HEADS, **options, rng=jax.random.key(0))


MAKE = {name: published(name, key_heads=2) for name in CATALOGUE} | {
    "no decay, no drift": bayesian(decay="none", drift="none", key_heads=1),
    "rates per key": bayesian(decay="key", drift="key", algorithm="parallel"),
    "dial": bayesian(restoration=0.5, learn_restoration=True, key_width=3, value_width=5),
}

X = jax.random.normal(jax.random.key(1), (TIME, D_MODEL))
NOISE = jax.random.normal(jax.random.key(2), (TIME, D_MODEL))
WEIGHT = jax.random.normal(jax.random.key(3), (TIME, D_MODEL))


def close(ours, theirs, factor=8.0, time=TIME):
    """Within eps × time of the largest entry, up to a factor."""
    for own, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        scale = np.max(np.abs(other), initial=1.0)
        np.testing.assert_allclose(own, other, rtol=0, atol=factor * EPS * time * scale)


@cache
def made(name):
    return MAKE[name]()


@eqx.filter_jit
def run(layer, x, state, segment_ids, mask, weight):
    """Outputs, prediction and last state, and the gradient of a number made of the first two."""

    @eqx.filter_grad(has_aux=True)
    def objective(layer):
        outputs, prediction, later = layer.run(x, state, segment_ids=segment_ids, mask=mask)
        number = jnp.sum(weight * outputs) + jnp.mean(prediction.log_evidence)
        return number, (outputs, prediction, later)

    slopes, said = objective(layer)
    return said, slopes


@eqx.filter_jit
def decode(layer, x):
    """Outputs, predictions and states after every token."""

    def body(state, token):
        output, prediction, state = layer.predict_step(token, state)
        return state, (output, prediction, state)

    return jax.lax.scan(body, layer.init_state(), x)[1]


def padded(part):
    """A part of the sequence, then something else up to its full length; and the mask of it."""
    count = len(part)
    return jnp.concatenate([part, NOISE[count:]]), jnp.arange(TIME) < count


DOCUMENTS = ((0, 3), (3, 11), (11, 16))
SEGMENTS = jnp.asarray(np.repeat([1, 0, 1], [3, 8, 5]))
ONE, ALL = jnp.zeros(TIME, int), jnp.ones(TIME, bool)


@pytest.mark.parametrize("name", MAKE)
def test_a_mixer_says_the_same_however_its_sequence_is_cut(name):
    layer = made(name)
    start = layer.init_state()
    outputs, predictions, states = decode(layer, X)

    (full, prediction, state), _ = run(layer, X, start, ONE, ALL, WEIGHT)
    close((full, prediction), (outputs, predictions))
    close(state, jax.tree.map(lambda leaf: leaf[-1], states))
    assert prediction.mean.shape == (TIME, HEADS, layer.memory.value_width)

    # Right padding, then going on.
    first, mask = padded(X[:7])
    (early, prediction, state), _ = run(layer, first, start, ONE, mask, WEIGHT)
    close(early[:7], outputs[:7])
    close(state, jax.tree.map(lambda leaf: leaf[6], states))
    for part in jax.tree.leaves((early, prediction)):
        np.testing.assert_array_equal(part[7:], 0)
    rest, mask = padded(X[7:])
    close(run(layer, rest, state, ONE, mask, WEIGHT)[0][0][:9], outputs[7:])

    # Left padding.
    rolled = jnp.roll(first, 9, axis=0)
    (late, _, state), _ = run(layer, rolled, start, ONE, jnp.arange(TIME) >= 9, WEIGHT)
    close(late[9:], outputs[:7])

    # Packed documents, which have numbers that come again.
    (packed, prediction, state), _ = run(layer, X, start, SEGMENTS, ALL, WEIGHT)
    for begin, end in DOCUMENTS:
        alone, predictions, states = decode(layer, padded(X[begin:end])[0])
        close(packed[begin:end], alone[: end - begin])
        close(
            jax.tree.map(lambda leaf: leaf[begin:end], prediction),  # noqa: B023
            jax.tree.map(lambda leaf: leaf[: end - begin], predictions),  # noqa: B023
        )
    close(state, jax.tree.map(lambda leaf: leaf[end - begin - 1], states))


@pytest.mark.parametrize("name", MAKE)
def test_gradients_of_packed_documents_are_the_sum_of_those_alone(name):
    layer = made(name)
    start = layer.init_state()
    together = run(layer, X, start, SEGMENTS, ALL, WEIGHT)[1]
    alone = None
    for begin, end in DOCUMENTS:
        part, mask = padded(X[begin:end])
        gradient = run(layer, part, start, ONE, mask, padded(WEIGHT[begin:end])[0])[1]
        alone = gradient if alone is None else jax.tree.map(np.add, alone, gradient)
    for leaf in jax.tree.leaves(together):
        assert np.all(np.isfinite(leaf))
    close(together, alone, factor=8.0, time=TIME**2)


@pytest.mark.parametrize("name", MAKE)
def test_a_mixer_in_bfloat16_gives_bfloat16(name):
    layer = made(name)
    token = X[0].astype(jnp.bfloat16)
    outputs, prediction = eqx.filter_eval_shape(layer, X.astype(jnp.bfloat16))
    output, state = eqx.filter_eval_shape(layer.step, token, layer.init_state())
    assert outputs.dtype == output.dtype == jnp.bfloat16
    assert prediction.variance.dtype == jnp.float32
    for leaf in jax.tree.leaves(state.memories):
        assert leaf.dtype == jnp.float32


@pytest.mark.parametrize("name", ["gated_deltanet", "dial"])
def test_a_mixer_in_bfloat16_is_near_float32(name):
    layer = made(name)
    coarse, _ = eqx.filter_jit(layer)(X.astype(jnp.bfloat16))
    fine, _ = eqx.filter_jit(layer)(X)
    gap = jnp.abs(coarse.astype(jnp.float32) - fine)
    assert jnp.median(gap) < 0.02 * jnp.max(jnp.abs(fine))


@pytest.mark.parametrize("name", ["longhorn", "mesanet", "dial"])
def test_a_sequence_may_be_empty_or_one_token(name):
    layer = made(name)
    outputs, _, state = eqx.filter_jit(layer.run)(X[:1], layer.init_state())
    alone, later = eqx.filter_jit(layer.step)(X[0], layer.init_state())
    close((outputs[0], state), (alone, later))
    packing = {"segment_ids": ONE[:0], "mask": ALL[:0]}
    for options in ({}, packing):
        outputs, prediction, state = layer.run(X[:0], layer.init_state(), **options)
        assert outputs.shape == (0, D_MODEL)
        assert prediction.log_evidence.shape == (0, HEADS)
        close(state, layer.init_state())


@pytest.mark.parametrize("name", MAKE)
def test_a_mixer_is_shown_in_one_line_with_its_size(name):
    layer = made(name)
    shown = repr(layer)
    assert "\n" not in shown
    assert f"{parameter_count(layer):,} parameters" in shown
    arrays = jax.tree.leaves(eqx.filter(layer, eqx.is_array))
    assert parameter_count(layer) == sum(array.size for array in arrays)


@pytest.mark.parametrize("name", MAKE)
def test_a_training_step_and_a_decoding_step_compile_once(name):
    """What is made has the types of what an update or a step returns; a weak type is another."""
    layer = made(name)
    state = layer.init_state()
    for leaf in jax.tree.leaves(eqx.filter((layer, state), eqx.is_array)):
        assert not leaf.weak_type
    later = eqx.filter_eval_shape(layer.step, X[0], state)[1]
    assert jax.tree.map(jax.typeof, later) == jax.tree.map(jax.typeof, state)


def test_wrong_shapes_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    layer = made("dial")
    with pytest.raises(ValueError, match=r"`x` is \(16, 17\); this layer takes \(time, 16\)"):
        layer(jnp.zeros((TIME, 17)))
    with pytest.raises(ValueError, match=r"`x` is \(17,\); a step takes one token, \(16,\)"):
        layer.step(jnp.zeros(17), layer.init_state())
    with pytest.raises(ValueError, match=r"`x` is \(2, 16, 16\); .* jax.vmap over a batch"):
        layer(jnp.zeros((2, TIME, D_MODEL)))
    with pytest.raises(ValueError, match=r"`mask` is \(5,\); it must be \(16,\)"):
        layer(X, mask=ALL[:5])
    with pytest.raises(ValueError, match=r"`segment_ids` is \(5,\); it must be \(16,\)"):
        layer(X, segment_ids=ONE[:5])


def test_arguments_that_make_no_layer_are_refused(monkeypatch):
    rng = jax.random.key(0)
    with pytest.raises(ValueError, match="`d_model` is 16, no multiple of `heads`, 3"):
        BayesianLayer(16, 3, rng=rng)
    with pytest.raises(ValueError, match="`heads` is 4; it must be a multiple of `key_heads`, 3"):
        published_mixer("deltanet", 16, 4, key_heads=3, rng=rng)
    with pytest.raises(ValueError, match=r"`restoration` is 1\.5; it must lie between 0 and 1"):
        BayesianLayer(16, 4, restoration=1.5, rng=rng)
    with pytest.raises(ValueError, match="`learn_restoration` needs a `restoration`"):
        BayesianLayer(16, 4, learn_restoration=True, rng=rng)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"`decay` is 'keys'; it must be .none., .scalar. or .key"):
        BayesianLayer(16, 4, decay="keys", rng=rng)


def test_grouped_heads_share_their_keys_and_queries():
    layer = made("kda")
    for name, distinct in (("key", 2), ("query", 2), ("value", 4)):
        source = layer.sources[name]
        heads = source(X, source.init_state())[0]
        assert len(np.unique(np.asarray(heads[3]), axis=0)) == distinct


# -- the restoration dial -------------------------------------------------------------------------


def with_parameters_of(layer, other):
    """`layer` with the parameters that `other` has of the same name."""

    def copy(own, given):
        return eqx.combine(
            eqx.filter(given, eqx.is_array), eqx.filter(own, eqx.is_array, inverse=True)
        )

    sources = {
        name: copy(source, other.sources[name]) if name in other.sources else source
        for name, source in layer.sources.items()
    }
    return eqx.tree_at(
        lambda layer: (layer.sources, layer.norm, layer.gate, layer.out),
        layer,
        (sources, other.norm, other.gate, other.out),
    )


def test_the_dial_at_zero_is_a_gated_deltanet():
    reset = published("gated_deltanet")()
    dial = with_parameters_of(bayesian(restoration=0.0, drift="none")(), reset)
    close(eqx.filter_jit(dial)(X)[0], eqx.filter_jit(reset)(X)[0])
    close(decode(dial, X)[0], eqx.filter_jit(reset)(X)[0])


def test_the_dial_at_one_is_the_exact_filter():
    exact = bayesian()()
    dial = with_parameters_of(bayesian(restoration=1.0)(), exact)
    (outputs, prediction), (ours, predicted) = eqx.filter_jit(exact)(X), eqx.filter_jit(dial)(X)
    close((ours, predicted), (outputs, prediction))


def test_a_dial_that_starts_at_zero_is_learned():
    layer = bayesian(restoration=0.0, learn_restoration=True)()
    slopes = run(layer, X, layer.init_state(), ONE, ALL, WEIGHT)[1]
    slope = slopes.sources["restoration"].parameter
    assert np.all(np.isfinite(slope))
    assert np.all(slope != 0)


def test_a_dial_that_is_fixed_is_not_learned():
    dial = bayesian(restoration=0.5)().sources["restoration"]
    slopes = eqx.filter_grad(lambda dial: jnp.sum(dial(X, None)[0]))(dial)
    np.testing.assert_array_equal(slopes.parameter, 0)


# -- against a peer, over a long sequence, and in a language model --------------------------------


def test_a_gated_deltanet_agrees_with_jax_linear_attention():
    layer = published("gated_deltanet", key_heads=2)()
    u = {name: source(X, source.init_state())[0] for name, source in layer.sources.items()}
    outputs, _ = linear_attention(
        "gated_deltanet",
        q=u["query"][None] * layer.memory.key_width**0.5,
        k=u["key"][None],
        v=u["value"][None],
        g=u["log_decay"][None],
        beta=1 / (1 + u["noise"])[None],
        impl="reference",
    )
    _, prediction = eqx.filter_jit(layer)(X)
    # The peer's keys have length 1; ours lose the 1e-6 that keeps zero differentiable.
    np.testing.assert_allclose(prediction.mean, outputs[0], atol=1e-5)


def test_decoding_equals_the_full_pass_over_thousands_of_tokens():
    time = 4096
    layer = BayesianLayer(8, 1, key_width=4, value_width=4, rng=jax.random.key(0))
    x = jax.random.normal(jax.random.key(4), (time, 8))
    outputs, prediction = eqx.filter_jit(layer)(x)
    decoded, predictions, _ = decode(layer, x)
    close((outputs, prediction), (decoded, predictions), factor=1.0, time=time)


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_decodes_its_full_pass(tied):
    def make(rng):
        return published_mixer("deltanet", D_MODEL, 2, rng=rng)

    model = LanguageModel(11, D_MODEL, 2, make, hidden=8, tied=tied, rng=jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(5), (TIME,), 0, 11)
    logits, predictions = eqx.filter_jit(model)(tokens)
    assert logits.shape == (TIME, 11)
    assert len(predictions) == 2

    @eqx.filter_jit
    def steps(model):
        return jax.lax.scan(lambda s, token: model.step(token, s)[::-1], model.init_state(), tokens)

    close(steps(model)[1], logits)
    mixer = parameter_count(make(jax.random.key(0)))
    block = 2 * D_MODEL + mixer + 3 * D_MODEL * 8
    head = 0 if tied else 11 * D_MODEL
    assert parameter_count(model) == 11 * D_MODEL + 2 * block + D_MODEL + head
    assert f"{parameter_count(model):,} parameters" in repr(model)
    assert "\n" not in repr(model)
