"""Bayesian Layers in place of a checkpoint's delta rules: the same logits at restoration 0."""

import json
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoints import EXPECTED, GOLDEN, SMALL, VARIANTS, drawn

from design_models import ModelError
from layers import LanguageModel, SequenceMixer
from layers.sources import PerHead, identity
from recall.checkpoints.comparison import compare
from recall.checkpoints.configuration import configuration_of
from recall.checkpoints.folder import read_checkpoint, write_checkpoint
from recall.checkpoints.model import logits, model_of
from recall.checkpoints.surgery import dials, restoration_of, with_dials, with_restoration

TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 19, (1, 70)))
LAYOUTS = ("as it comes", "grouped values", "DeltaNet, elu", "DeltaNet, bare keys")


def small(settings: dict = SMALL, size: float = 0.5) -> LanguageModel:
    configuration = configuration_of(settings)
    return model_of(configuration, drawn(configuration, size=size))


inputs_of = eqx.filter_jit(SequenceMixer.head_inputs)


def furthest(found, expected) -> float:
    """Largest difference of logits, beside the largest logit."""
    return float(jnp.abs(found - expected).max() / jnp.abs(expected).max())


def test_a_checkpoint_still_agrees_with_flash_linear_attention_at_restoration_0():
    assert compare(with_restoration(read_checkpoint(GOLDEN).model), EXPECTED).error < 1e-4


@pytest.mark.parametrize("size", [0.02, 0.5], ids=["short keys", "long keys"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_unchanged_to_rounding(layout, size):
    """Worst seen 1.0e-5; keys that are written with strength 1, without noise, too."""
    model = small(VARIANTS[layout], size)
    assert furthest(logits(with_restoration(model), TOKENS), logits(model, TOKENS)) < 5e-5


def test_decoding_is_unchanged_to_rounding():
    model = small()
    restored = with_restoration(model, heads=[1])
    step = eqx.filter_jit(LanguageModel.step)
    before, after = model.init_state(), restored.init_state()
    for token in TOKENS[0, :6]:
        expected, before = step(model, token, before)
        found, after = step(restored, token, after)
        assert furthest(found, expected) < 5e-5


def test_restored_layers_decode_as_they_read():
    restored = with_restoration(small(), restoration=0.9)
    expected, state = logits(restored, TOKENS)[0], restored.init_state()
    step = eqx.filter_jit(LanguageModel.step)
    for time, token in enumerate(TOKENS[0, :12]):
        found, state = step(restored, token, state)
        assert furthest(found, expected[time]) < 5e-5


def test_chosen_layers_alone_change():
    model = small()
    restored = with_restoration(model, layers=[1])
    assert "restoration" not in restored.blocks[0].mixer.sources
    assert "restoration" in restored.blocks[1].mixer.sources
    for block, before in zip(restored.blocks, model.blocks, strict=True):
        for name, source in before.mixer.sources.items():
            assert eqx.tree_equal(block.mixer.sources[name], source)


def test_chosen_heads_alone_are_restored():
    """Of one layer, restored in full: the other head's read-outs stay, the chosen one's do not."""
    model = small()
    restored = with_restoration(model, layers=[0], heads=[1], restoration=1.0)
    x = model.embedding[TOKENS[0]]
    before, after = (eqx.filter_jit(one.blocks[0])(x)[1] for one in (model, restored))
    assert furthest(after.mean[:, 0], before.mean[:, 0]) < 5e-5
    assert furthest(after.mean[:, 1], before.mean[:, 1]) > 1e-2
    np.testing.assert_array_less(0, after.variance[:, 1])


def test_training_moves_the_chosen_restorations_and_no_others():
    restored = with_restoration(small(), layers=[1], heads=[0])

    def loss(model):
        return -jnp.mean(jax.nn.log_softmax(model(TOKENS[0])[0])[:, 0])

    gradient = eqx.filter_jit(eqx.filter_grad(loss))(restored)
    assert all(
        bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient) if leaf is not None
    )
    dial = gradient.blocks[1].mixer.sources["restoration"].parameter
    assert dial[0] != 0
    assert dial[1] == 0


def test_restored_parameters_have_the_types_that_a_step_leaves():
    """Weakly typed, they would have the second step of a training compiled anew."""
    restored = with_restoration(small(), layers=[1])
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(eqx.filter(restored, eqx.is_array)))


def test_restored_layers_are_written_and_read_again(tmp_path):
    checkpoint = read_checkpoint(GOLDEN)
    model = with_restoration(checkpoint.model, layers=[2], heads=[1], restoration=0.3)
    model = with_restoration(model, layers=[1], restoration=1.0, learned=False)
    changed = with_dials(
        model.blocks[2].mixer, {"reset": jnp.full(2, 0.1), "stationary.bias": jnp.full(2, -3.0)}
    )
    model = eqx.tree_at(lambda model: model.blocks[2].mixer, model, changed)
    write_checkpoint(tmp_path / "out", replace(checkpoint, model=model))
    again = read_checkpoint(tmp_path / "out").model
    assert eqx.tree_equal(again, model)
    assert [restoration_of(block.mixer) for block in again.blocks] == [
        restoration_of(block.mixer) for block in model.blocks
    ]


def test_a_restoration_that_does_not_fit_is_refused_in_one_line(tmp_path):
    checkpoint = read_checkpoint(GOLDEN)
    model = with_restoration(checkpoint.model, layers=[2])
    write_checkpoint(tmp_path / "out", replace(checkpoint, model=model))
    told = json.loads((tmp_path / "out" / "restoration.json").read_text())
    (tmp_path / "out" / "restoration.json").write_text(json.dumps({"9": told["2"]}))
    with pytest.raises(ModelError, match="remove both"):
        read_checkpoint(tmp_path / "out")


def test_the_reset_variance_changes_nothing_at_restoration_0_and_much_at_1():
    model = small()
    tokens = TOKENS[:, :20]

    def with_reset(restoration: float) -> jnp.ndarray:
        restored = with_restoration(model, layers=[0], restoration=restoration)
        mixer = with_dials(restored.blocks[0].mixer, {"reset": jnp.full(2, 1.5)})
        return logits(eqx.tree_at(lambda m: m.blocks[0].mixer, restored, mixer), tokens)

    assert furthest(with_reset(0.0), logits(model, tokens)) < 5e-5
    plain = logits(with_restoration(model, layers=[0], restoration=1.0), tokens)
    assert furthest(with_reset(1.0), plain) > 1e-2


def test_what_is_restored_for_good_is_the_exact_filter():
    model = small()
    held = with_restoration(model, layers=[0], restoration=1.0, learned=False)
    dialled = with_restoration(model, layers=[0], restoration=1.0)
    assert "restoration" not in held.blocks[0].mixer.sources
    assert furthest(logits(held, TOKENS), logits(dialled, TOKENS)) < 5e-5


def test_a_restored_layer_is_the_filter_of_a_memory_that_keeps_its_variance():
    """S = a S + N(0, (1 − a²) p), v = S k + N(0, σ² (1/β − |k|²)): token by token in float64."""
    mixer = with_restoration(small(), layers=[0], restoration=1.0).blocks[0].mixer
    rng = np.random.default_rng(0)
    own = dials(mixer)
    changes = {
        "stationary.weight": jnp.asarray(rng.normal(0, 0.3, own["stationary.weight"].shape)),
        "reset": jnp.asarray([0.3, -0.2]),
    }
    mixer = with_dials(mixer, changes)
    x = jnp.asarray(rng.normal(0, 1, (40, mixer.d_model)), jnp.float32)
    u = {name: np.asarray(part, float) for name, part in inputs_of(mixer, x).items()}
    prediction = eqx.filter_jit(mixer)(x)[1]
    logit = np.asarray(x, float) @ np.asarray(changes["stationary.weight"], float)
    for head in range(mixer.heads):
        memory = np.zeros((u["value"].shape[-1], u["key"].shape[-1]))
        covariance = np.eye(u["key"].shape[-1])
        for t in range(len(x)):
            key, query = u["key"][t, head], u["query"][t, head]
            decay = np.exp(u["log_decay"][t, head])
            noise = np.exp(changes["reset"][head]) * (1 / u["strength"][t, head] - key @ key)
            variance = 2 / (1 + np.exp(-logit[t, head]))
            covariance = decay**2 * covariance + (1 - decay**2) * variance * np.eye(len(key))
            gain = covariance @ key / (key @ covariance @ key + noise)
            memory = decay * memory
            memory = memory + np.outer(u["value"][t, head] - memory @ key, gain)
            covariance = covariance - np.outer(gain, key @ covariance)
            np.testing.assert_allclose(
                prediction.mean[t, head], memory @ query, rtol=1e-4, atol=1e-5
            )
            np.testing.assert_allclose(
                prediction.variance[t, head], query @ covariance @ query, rtol=1e-4, atol=1e-6
            )


def test_where_nothing_is_written_a_restored_layer_is_as_sure_as_its_delta_rule():
    """However fast it decays: gains at the start are its strengths, and so they are later on."""
    model = small()
    mixer = with_restoration(model, layers=[0], restoration=1.0).blocks[0].mixer
    silent = eqx.tree_at(
        lambda mixer: mixer.sources["strength"],
        mixer,
        PerHead(jnp.full(mixer.heads, 1e-6), identity),
    )
    x = jnp.asarray(np.random.default_rng(0).normal(0, 1, (60, mixer.d_model)), jnp.float32)
    u, prediction = inputs_of(silent, x), eqx.filter_jit(silent)(x)[1]
    assert float(u["log_decay"].min()) < -1
    np.testing.assert_allclose(
        prediction.variance, jnp.sum(jnp.square(u["query"]), axis=-1), rtol=1e-4
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": [2]}, "`layers` holds 2; there are 2"),
        ({"heads": [-1]}, "`heads` holds -1"),
        ({"restoration": 1.5}, "`restoration` is 1.5"),
    ],
)
def test_what_is_not_there_cannot_be_restored(change, said):
    with pytest.raises(ValueError, match=said):
        with_restoration(small(), **change)


def test_a_layer_is_restored_once():
    with pytest.raises(ValueError, match="restored already"):
        with_restoration(with_restoration(small()), layers=[0])


def test_negative_eigenvalues_have_no_restoration():
    with pytest.raises(ValueError, match="negative eigenvalues"):
        with_restoration(small(VARIANTS["negative eigenvalues"]))
