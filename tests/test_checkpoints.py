"""Checkpoints of flash-linear-attention: what is read, what is refused, what is written back.

Two oracles: logits that flash-linear-attention 0.6.0 gave for a checkpoint that it wrote itself,
and its layers' equations in NumPy float64, token by token, in its own names and shapes.
"""

import json
import math
import shutil
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from design_models import ModelError
from layers import LanguageModel
from recall.checkpoints import names
from recall.checkpoints.comparison import compare
from recall.checkpoints.configuration import Configuration, configuration_of
from recall.checkpoints.folder import read_checkpoint, write_checkpoint
from recall.checkpoints.model import empty_model, logits, model_of, tensors_of
from recall.cli import main

GOLDEN = Path(__file__).parent / "data" / "gated_deltanet_tiny"
EXPECTED = GOLDEN / "expected.safetensors"

SMALL = {
    "model_type": "gated_deltanet",
    "vocab_size": 19,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "head_dim": 4,
    "intermediate_size": 20,
}
SMALL_DELTA = {
    "model_type": "delta_net",
    "vocab_size": 19,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_heads": 3,
    "intermediate_size": 20,
}
VARIANTS = {
    "as it comes": SMALL,
    "grouped values": SMALL | {"num_v_heads": 6, "expand_v": 1.5},
    "one head, values narrower": SMALL | {"num_heads": 1, "expand_v": 0.5, "conv_size": 2},
    "no gate": SMALL | {"use_gate": False, "norm_eps": 1e-2},
    "sigmoid gate": SMALL | {"output_gate_activation": "sigmoid"},
    "no convolution": SMALL | {"use_short_conv": False},
    "negative eigenvalues": SMALL | {"allow_neg_eigval": True},
    "tied": SMALL | {"tie_word_embeddings": True},
    "DeltaNet": SMALL_DELTA,
    "DeltaNet, other widths": SMALL_DELTA | {"expand_k": 0.5, "expand_v": 2, "use_gate": True},
    "DeltaNet, relu": SMALL_DELTA | {"qk_activation": "relu", "use_short_conv": False},
    "DeltaNet, elu": SMALL_DELTA | {"qk_activation": "elu"},
    "DeltaNet, bare keys": SMALL_DELTA | {"qk_activation": "identity", "use_beta": False},
}


def drawn(configuration: Configuration, seed: int = 0, size: float = 0.5) -> dict:
    """Random weights, in the format's names and shapes; `size` is that of keys and queries."""
    rng = np.random.default_rng(seed)
    return {
        name: (deviation * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in names.shapes(configuration).items()
        for deviation in (size if ".q_" in name or ".k_" in name else 0.5,)
    }


def checkpoint(folder: Path, settings: dict, tensors: dict | None = None) -> Path:
    """Write a folder as upstream does."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    held = drawn(configuration_of(settings)) if tensors is None else tensors
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# -- the oracle: upstream's equations, in float64, one token after another ------------------------


def textbook_logits(settings: dict, tensors: dict, tokens: np.ndarray) -> np.ndarray:
    weights = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    embedding = weights["model.embeddings.weight"]
    eps = settings.get("norm_eps", 1e-6)
    x = embedding[tokens]
    for layer in range(settings["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        x = x + _attention(settings, own, _rms(x, own["attn_norm.weight"], eps), eps)
        normed = _rms(x, own["mlp_norm.weight"], eps)
        gate = _silu(normed @ own["mlp.gate_proj.weight"].T)
        x = x + (gate * (normed @ own["mlp.up_proj.weight"].T)) @ own["mlp.down_proj.weight"].T
    x = _rms(x, weights["model.norm.weight"], eps)
    return x @ weights.get("lm_head.weight", embedding).T


def _attention(settings, own, x, eps):
    heads = settings["num_heads"]
    gated = settings["model_type"] == "gated_deltanet"
    value_heads = settings.get("num_v_heads") or heads
    activation = settings.get("qk_activation", "silu")
    act = {
        "silu": _silu,
        "relu": lambda z: np.maximum(z, 0),
        "elu": lambda z: np.where(z > 0, z, np.expm1(np.minimum(z, 0))) + 1,
        "identity": lambda z: z,
    }[activation]
    q = act(_convolved(own, "q", x)).reshape(len(x), heads, -1)
    k = act(_convolved(own, "k", x)).reshape(len(x), heads, -1)
    v = _silu(_convolved(own, "v", x)).reshape(len(x), value_heads, -1)
    q, k = (z / np.sqrt((z**2).sum(-1, keepdims=True) + 1e-6) for z in (q, k))
    beta = np.ones((len(x), value_heads))
    if settings.get("use_beta", True):
        beta = _sigmoid(x @ own["attn.b_proj.weight"].T)
    if settings.get("allow_neg_eigval", False):
        beta = 2 * beta
    g = np.zeros((len(x), value_heads))
    if gated:
        step = np.logaddexp(0, x @ own["attn.a_proj.weight"].T + own["attn.dt_bias"])
        g = -np.exp(own["attn.A_log"]) * step
    out = np.zeros_like(v)
    for head in range(value_heads):
        source = head // (value_heads // heads)
        state = np.zeros((k.shape[-1], v.shape[-1]))
        for t in range(len(x)):
            state = np.exp(g[t, head]) * state
            key = k[t, source]
            state = state + np.outer(key, beta[t, head] * (v[t, head] - state.T @ key))
            out[t, head] = state.T @ q[t, source] * key.size**-0.5
    out = _rms(out, own["attn.o_norm.weight"], eps)
    if settings.get("use_gate", gated):
        logit = x @ own["attn.g_proj.weight"].T
        kind = settings.get("output_gate_activation", "swish")
        out = out * (_sigmoid if kind == "sigmoid" else _silu)(logit).reshape(out.shape)
    return out.reshape(len(x), -1) @ own["attn.o_proj.weight"].T


def _convolved(own, letter, x):
    channels = x @ own[f"attn.{letter}_proj.weight"].T
    taps = own.get(f"attn.{letter}_conv1d.weight")
    if taps is None:
        return channels
    out = np.zeros_like(channels)
    for t in range(len(x)):
        for back in range(min(t + 1, taps.shape[-1])):
            out[t] += channels[t - back] * taps[:, 0, taps.shape[-1] - 1 - back]
    return out


def _rms(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def _sigmoid(z):
    return 1 / (1 + np.exp(-z))


def _silu(z):
    return z * _sigmoid(z)


def _relative(found, expected) -> float:
    """Error of the worst token."""
    difference = np.asarray(found, np.float64) - expected
    norm = np.linalg.norm
    return float(np.max(norm(difference, axis=-1) / norm(expected, axis=-1)))


# -- logits ---------------------------------------------------------------------------------------


def test_logits_are_those_of_flash_linear_attention():
    """Worst seen 1.1e-5 at a token, 4.7e-6 over all."""
    found = compare(read_checkpoint(GOLDEN).model, EXPECTED)
    assert found.tokens == 192
    assert found.error < 1e-4
    assert found.agrees


def test_the_textbook_agrees_with_flash_linear_attention():
    """The NumPy oracle below is judged by upstream's own numbers, not by ours."""
    settings = json.loads((GOLDEN / "config.json").read_text())
    held = load_file(EXPECTED)
    found = textbook_logits(settings, load_file(GOLDEN / "model.safetensors"), held["input_ids"][0])
    assert _relative(found, held["logits"][0]) < 1e-4


@pytest.mark.parametrize("size", [0.02, 0.5], ids=["short keys", "long keys"])
@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_every_layout_agrees_with_the_equations(settings, size):
    """Worst seen 1.5e-5; squares of short keys are near the 1e-6 that upstream adds to them."""
    configuration = configuration_of(settings)
    tensors = drawn(configuration, size=size)
    tokens = np.random.default_rng(1).integers(0, 19, 70)  # more than a chunk
    found = logits(model_of(configuration, tensors), jnp.asarray(tokens[None], jnp.int32))[0]
    assert _relative(found, textbook_logits(settings, tensors, tokens)) < 1e-4


@pytest.mark.parametrize("name", ["grouped values", "negative eigenvalues", "DeltaNet, bare keys"])
def test_decoding_gives_the_logits_of_the_full_pass(name):
    configuration = configuration_of(VARIANTS[name])
    model = model_of(configuration, drawn(configuration))
    tokens = jnp.arange(12) % 19
    full = model(tokens)[0]
    states, step = model.init_state(), eqx.filter_jit(LanguageModel.step)
    for token, expected in zip(tokens, full, strict=True):
        found, states = step(model, token, states)
        np.testing.assert_allclose(found, expected, atol=1e-4 * float(jnp.abs(full).max()))


# -- sizes ----------------------------------------------------------------------------------------

LARGE = {
    "library default": ({"model_type": "gated_deltanet"}, 1387.3e6),
    "gated_deltanet_340M": (
        {"model_type": "gated_deltanet", "hidden_size": 1024, "num_hidden_layers": 21},
        512.27e6,
    ),
    "gated-deltanet-360M": (
        {
            "model_type": "gated_deltanet",
            "hidden_size": 1024,
            "num_hidden_layers": 21,
            "num_heads": 4,
            "expand_v": 1,
        },
        357_781_928,
    ),
    "delta_net_340M": ({"model_type": "delta_net", "hidden_size": 1024, "num_heads": 8}, 374.36e6),
}


@pytest.mark.parametrize(("settings", "parameters"), LARGE.values(), ids=LARGE)
def test_published_sizes_have_the_parameters_that_upstream_counts(settings, parameters):
    """Shapes alone; a model of any of them takes tokens."""
    configuration = configuration_of(settings)
    rounded = pytest.approx(parameters, rel=5e-5)
    assert sum(map(math.prod, names.shapes(configuration).values())) == rounded
    model = empty_model(configuration)
    leaves = jax.tree.leaves(eqx.filter(model, lambda leaf: hasattr(leaf, "shape")))
    assert sum(leaf.size for leaf in leaves) == rounded
    tokens = jax.ShapeDtypeStruct((128,), jnp.int32)
    scores = eqx.filter_eval_shape(lambda model, tokens: model(tokens)[0], model, tokens)
    assert scores.shape == (128, 32000)


@pytest.mark.slow
def test_a_checkpoint_with_heads_of_the_published_width_loads_and_runs(tmp_path):
    smaller = {"num_hidden_layers": 1, "vocab_size": 64, "num_heads": 6}
    settings = LARGE["gated_deltanet_340M"][0] | smaller
    folder = checkpoint(tmp_path / "wide", settings, drawn(configuration_of(settings), size=0.02))
    model = read_checkpoint(folder).model
    tokens = np.arange(70) % 64
    expected = textbook_logits(settings, load_file(folder / "model.safetensors"), tokens)
    assert _relative(logits(model, jnp.asarray(tokens[None]))[0], expected) < 1e-4


# -- there and back -------------------------------------------------------------------------------


def test_a_folder_is_written_back_byte_for_byte(tmp_path):
    folder = tmp_path / "one"
    shutil.copytree(GOLDEN, folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    write_checkpoint(tmp_path / "two", read_checkpoint(folder))
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "two" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_half_precision_comes_back_bit_for_bit(dtype, tmp_path):
    """Every number that is finite, the subnormal ones too; a rate stays float32 beside them."""
    tensors = {
        name: tensor if name.endswith("A_log") else tensor.astype(dtype)
        for name, tensor in drawn(configuration_of(SMALL)).items()
    }
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    every = np.where(np.isfinite(every.astype(np.float32)), every, dtype(0))
    settings = SMALL | {"vocab_size": 2**16 // 12}
    for name in (names.EMBEDDING, names.HEAD):
        tensors[name] = every[: 2**16 // 12 * 12].reshape(-1, 12)
    folder = checkpoint(tmp_path / "one", settings, tensors)
    write_checkpoint(tmp_path / "two", read_checkpoint(folder))
    weights = "model.safetensors"
    assert (tmp_path / "two" / weights).read_bytes() == (folder / weights).read_bytes()


def sharded(folder: Path, tensors: dict | None = None) -> Path:
    """A checkpoint in two files and an index."""
    checkpoint(folder, SMALL, tensors)
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    listed = {}
    for number, part in enumerate((list(held)[::2], list(held)[1::2]), start=1):
        shard = f"model-{number:05}-of-00002.safetensors"
        save_file({name: held[name] for name in part}, folder / shard, metadata={"format": "pt"})
        listed |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_are_read_and_written_back_as_shards(tmp_path):
    folder = sharded(tmp_path / "one")
    found = read_checkpoint(folder)
    whole = drawn(found.configuration)
    for name, tensor in tensors_of(found.model, found.configuration).items():
        np.testing.assert_array_equal(tensor, whole[name])
    write_checkpoint(tmp_path / "two", found)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {
        path.name for path in folder.iterdir()
    }
    for path in folder.iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_every_layout_comes_back_as_it_was(settings):
    configuration = configuration_of(settings)
    tensors = drawn(configuration)
    found = tensors_of(model_of(configuration, tensors), configuration)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)


def test_a_tied_head_that_is_stored_is_written_back(tmp_path):
    settings = SMALL | {"tie_word_embeddings": True}
    tensors = drawn(configuration_of(settings))
    tensors[names.HEAD] = tensors[names.EMBEDDING].copy()
    folder = checkpoint(tmp_path / "one", settings, tensors)
    write_checkpoint(tmp_path / "two", read_checkpoint(folder))
    weights = "model.safetensors"
    assert (tmp_path / "two" / weights).read_bytes() == (folder / weights).read_bytes()


# -- what is refused ------------------------------------------------------------------------------


def _without(name):
    def change(tensors):
        del tensors[name]

    return change


def _with(name, shape, dtype=np.float32):
    def change(tensors):
        tensors[name] = np.zeros(shape, dtype)

    return change


ATTENTION = "model.layers.1.attn."


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_without(ATTENTION + "A_log"), "lacks model.layers.1.attn.A_log"),
        (_without("lm_head.weight"), "lacks lm_head.weight"),
        (_with(ATTENTION + "D", (2,)), "holds model.layers.1.attn.D, which"),
        (_with("model.layers.2.attn_norm.weight", (12,)), "holds model.layers.2"),
        (_with(ATTENTION + "q_conv1d.bias", (8,)), "holds model.layers.1.attn.q_conv1d.bias"),
        (_with(ATTENTION + "o_norm.weight", (4,)), "o_norm.weight is (4,); its config.json asks"),
        (_with(ATTENTION + "q_proj.weight", (12, 8)), "q_proj.weight is (12, 8)"),
        (_with("model.norm.weight", (12,), np.float64), "model.norm.weight is F64"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(change, said, tmp_path, capsys):
    tensors = drawn(configuration_of(SMALL))
    change(tensors)
    folder = checkpoint(tmp_path / "wrong", SMALL, tensors)
    assert main(["convert", str(folder)]) == 2
    answer = capsys.readouterr()
    assert answer.out == ""
    assert answer.err.count("\n") == 1
    assert said in answer.err


def test_pickled_weights_are_refused_and_never_opened(tmp_path, capsys):
    folder = checkpoint(tmp_path / "old", SMALL)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert main(["convert", str(folder)]) == 2
    assert "pytorch_model.bin, a pickle" in capsys.readouterr().err


@pytest.mark.parametrize("shard", ["pytorch_model-00001.bin", "../model.safetensors", "absent", 3])
def test_an_index_that_names_anything_but_safetensors_beside_it_is_refused(shard, tmp_path):
    folder = sharded(tmp_path / "one")
    (folder / "pytorch_model-00001.bin").write_bytes(b"cos\nsystem\n")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"index\.json names"):
        read_checkpoint(folder)


def test_an_index_that_is_wrong_about_a_weight_is_refused(tmp_path):
    folder = sharded(tmp_path / "one")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"wrong about model\.norm\.weight"):
        read_checkpoint(folder)


def test_a_shard_that_is_not_there_is_named(tmp_path):
    folder = sharded(tmp_path / "one")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks model-00002-of-00002\.safetensors"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_type": "llama"}, "`model_type` is 'llama'"),
        ({"attn": {"layers": [1], "num_heads": 2}}, "`attn` is"),
        ({"hidden_act": "gelu"}, "`hidden_act` is 'gelu'"),
        ({"num_v_heads": 3}, "`num_v_heads` is 3"),
        ({"expand_v": 1.3}, "`expand_v` is 1.3"),
        ({"head_dim": "4"}, "`head_dim` is '4'"),
        ({"num_heads": 0}, "`num_heads` is 0"),
        ({"use_gate": None}, "`use_gate` is None"),
        ({"norm_eps": 0}, "`norm_eps` is 0"),
        ({"quantization_config": {"bits": 4}}, "`quantization_config` is"),
        ({"model_type": "delta_net", "qk_norm": "sum"}, "`qk_norm` is 'sum'"),
        ({"model_type": "delta_net", "allow_neg_eigval": True}, "`allow_neg_eigval` is True"),
        ({"model_type": "delta_net", "num_heads": 5}, "no multiple of `num_heads`, 5"),
    ],
)
def test_configurations_of_other_models_are_refused(settings, said):
    with pytest.raises(ModelError, match=said):
        configuration_of(SMALL | settings)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder, "name a folder"),
        (lambda folder: folder.mkdir(), "config.json: No such file"),
        (lambda folder: (checkpoint(folder, SMALL) / "config.json").write_text("{"), "not JSON"),
        (lambda folder: (checkpoint(folder, SMALL) / "model.safetensors").unlink(), "holds no"),
        (
            lambda folder: (checkpoint(folder, SMALL) / "model.safetensors").write_bytes(b"{}"),
            "no safetensors file",
        ),
    ],
)
def test_folders_that_are_no_checkpoint_are_answered_in_one_line(make, said, tmp_path, capsys):
    make(tmp_path / "folder")
    assert main(["convert", str(tmp_path / "folder")]) == 2
    answer = capsys.readouterr().err
    assert answer.count("\n") == 1
    assert said in answer


def test_a_tied_head_that_differs_from_the_embedding_is_refused(tmp_path):
    settings = SMALL | {"tie_word_embeddings": True}
    folder = checkpoint(tmp_path / "one", settings, drawn(configuration_of(SMALL)))
    with pytest.raises(ModelError, match="`tie_word_embeddings` is true"):
        read_checkpoint(folder)


# -- the command ----------------------------------------------------------------------------------


def test_convert_prints_the_error_and_writes_the_folder_back(tmp_path, capsys):
    out, record = tmp_path / "back", tmp_path / "record.json"
    words = ["convert", str(GOLDEN), "--check", str(EXPECTED), "--out", str(out)]
    assert main([*words, "--json", str(record)]) == 0
    said = capsys.readouterr().out
    assert "gated_deltanet, 3 blocks, d_model 128, 2 heads of 64 x 32" in said
    assert "at the worst of 192 tokens" in said
    found = json.loads(record.read_text())
    assert found["comparison"]["agrees"]
    assert found["comparison"]["error"] < 1e-4
    weights = "model.safetensors"
    assert (out / weights).read_bytes() == (GOLDEN / weights).read_bytes()


def test_convert_ends_with_1_where_logits_depart(tmp_path, capsys):
    """One number that is wrong among 858,000 is enough."""
    tensors = load_file(GOLDEN / "model.safetensors")
    tensors[names.FINAL_NORM][3] *= 1.1
    settings = json.loads((GOLDEN / "config.json").read_text())
    folder = checkpoint(tmp_path / "wrong", settings, tensors)
    assert main(["convert", str(folder), "--check", str(EXPECTED)]) == 1
    assert "departs, by more than 0.001" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"logits": np.zeros((1, 2, 256), np.float32)}, "holds no input_ids"),
        (
            {"input_ids": np.zeros((1, 2)), "logits": np.zeros((1, 2, 256), np.float32)},
            "`input_ids` are float64",
        ),
        (
            {"input_ids": np.zeros((1, 2), int), "logits": np.zeros((1, 2, 8), np.float32)},
            "`logits` are (1, 2, 8)",
        ),
        (
            {"input_ids": np.full((1, 2), 256), "logits": np.zeros((1, 2, 256), np.float32)},
            "between 0 and 255",
        ),
    ],
)
def test_a_file_to_check_against_that_does_not_fit_is_refused(held, said, tmp_path, capsys):
    save_file(held, tmp_path / "expected.safetensors")
    assert main(["convert", str(GOLDEN), "--check", str(tmp_path / "expected.safetensors")]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_that_holds_something_is_not_written_over(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["convert", str(GOLDEN), "--out", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
