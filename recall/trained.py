r"""How far the theory of retrieval carries to layers that were trained.

Of every head of a trained mixer one reads off, over rows of pairs, what the theory takes: decay a,
drift q, noise r of its writes (through their mean first gain β, r = p₀ (1 − β)/β), the prior
variance p₀, the cosine of a question's query to the key it asks for, and how wide its keys are in
effect,

$$ K_{\mathrm{eff}} = 1/E (k_i \cdot k_j)^2, $$

which is K for random keys. The retention of the first pair after N more is then predicted three
times: from a, q, r and K; from a, q, r and K_eff; and from the head's own keys and gates, in dual
form, which is algebra and must agree. Measured is the weight of the pair's value in what the head
reads for its question, as a share of the query's length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from design_models import ModelError
from inference import retrieval
from layers.memory import StreamMemory
from layers.mixer import SequenceMixer
from layers.rules import Exact, Reset

from .models import RecallModel

_RATES = ("noise", "log_decay", "drift")


@dataclass(frozen=True)
class Effective:
    """What a trained head does at its writes, on average.

    Args:
        decay: a, geometric mean over writes.
        drift: q, mean over writes.
        noise: r, at the mean first gain.
        gain: that gain, β.
        prior_variance: p₀.
        width: K.
        effective_width: 1/E cos² of two keys of a row.
        mean_cosine: of two keys of a row.
        alignment: cosine of a question's query to the key it asks for.
        gain_spread: standard deviation of the first gain over writes.
    """

    decay: float
    drift: float
    noise: float
    gain: float
    prior_variance: float
    width: int
    effective_width: float
    mean_cosine: float
    alignment: float
    gain_spread: float


@dataclass(frozen=True)
class Carried:
    """Retention of one head after so many more pairs: measured, and predicted three times.

    Args:
        more: N.
        measured: mean over rows.
        standard_error: of that mean.
        from_width: predicted from a, q, r, K, and the alignment.
        from_effective_width: from a, q, r, K_eff, and the alignment.
        from_keys: from the head's own keys and gates; None where that is not algebra here.
    """

    more: tuple[int, ...]
    measured: tuple[float, ...]
    standard_error: tuple[float, ...]
    from_width: tuple[float, ...]
    from_effective_width: tuple[float, ...]
    from_keys: tuple[float, ...]


def last_mixer(model: RecallModel, inputs: Int[Array, "time ..."]) -> tuple[SequenceMixer, Array]:
    """The mixer of a model's last block, and the sequence that it is given.

    Raises:
        ModelError: it is no exact filter or delta rule with one noise, decay and drift a token.
    """
    x = model.embedding(inputs)
    for block in model.blocks[:-1]:
        x, _ = block(x)
    block = model.blocks[-1]
    mixer = block.mixer
    if not isinstance(mixer, SequenceMixer) or not _is_read_off(mixer.memory):
        name = getattr(mixer, "name", type(mixer).__name__)
        raise ModelError(
            f"`model` ends in {name}; a, q and r are read off exact filters and delta rules that "
            "write once a token."
        )
    return mixer, jax.vmap(block.norm)(x)


def _is_read_off(memory: Any) -> bool:
    is_alone = isinstance(memory, StreamMemory) and isinstance(memory.rule, Exact | Reset)
    return (
        is_alone
        and memory.observations == 1
        and all(memory.inputs.get(name, ()) == () for name in _RATES)
    )


def written(
    model: RecallModel, inputs: Int[np.ndarray, "row position 2"], pairs: int
) -> tuple[SequenceMixer, dict[str, Float[np.ndarray, "row pair head ..."]]]:
    """What every head writes, and the queries that ask for each row's first pair.

    Args:
        model: trained on pairs of vectors.
        inputs: rows of `pairs` pairs and then questions (`recall.tasks.associative`).
        pairs: how many.

    Returns:
        The mixer, and its inputs by name at the writes; `asked` is the query for the first pair.
    """
    mixer, _ = last_mixer(model, jnp.asarray(inputs[0]))

    def of_row(row):
        mixer, x = last_mixer(model, row)
        return mixer.head_inputs(x)

    u = jax.jit(jax.vmap(of_row))(jnp.asarray(inputs))
    u = {name: np.asarray(array, float) for name, array in u.items()}
    first = inputs[:, 0, 0]
    question = pairs + np.argmax(inputs[:, pairs:, 0] == first[:, None], axis=1)
    found = {name: array[:, :pairs] for name, array in u.items()}
    found["asked"] = u["query"][np.arange(len(inputs)), question]
    return mixer, found


def effective(mixer: SequenceMixer, given: dict[str, Any]) -> list[Effective]:
    """Read off every head's settings; `given` is as `written` returns it."""
    memory = mixer.memory
    assert isinstance(memory, StreamMemory)
    prior = memory.rule.variance if isinstance(memory.rule, Reset) else memory.prior_variance
    heads = []
    for head in range(mixer.heads):
        own = {
            name: array[:, head] if name == "asked" else array[:, :, head]
            for name, array in given.items()
        }
        keys, asked = own["key"], own["asked"]
        square = np.sum(keys**2, axis=-1)
        gains = prior * square / (prior * square + own["noise"])
        gain = float(np.mean(gains))
        unit = keys / np.sqrt(square)[..., None]
        cosines = unit @ unit.swapaxes(1, 2)
        apart = cosines[:, ~np.eye(keys.shape[1], dtype=bool)]
        aligned = np.sum(asked * unit[:, 0], axis=-1) / np.linalg.norm(asked, axis=-1)
        heads.append(
            Effective(
                float(np.exp(np.mean(own["log_decay"]))) if "log_decay" in own else 1.0,
                float(np.mean(own["drift"])) if "drift" in own else 0.0,
                prior * (1 - gain) / gain,
                gain,
                float(prior),
                memory.key_width,
                float(1 / np.mean(apart**2)),
                float(np.mean(apart)),
                float(np.mean(aligned)),
                float(np.std(gains)),
            )
        )
    return heads


def carried(mixer: SequenceMixer, given: dict[str, Any], more: Sequence[int]) -> list[Carried]:
    """Measured and predicted retention of the first pair, of every head."""
    memory = mixer.memory
    is_reset = isinstance(memory, StreamMemory) and isinstance(memory.rule, Reset)
    measured = _measured(mixer, given)[..., list(more)]
    found = []
    for head, told in enumerate(effective(mixer, given)):
        own = measured[:, head]
        deviation = own.std(axis=0, ddof=1) / np.sqrt(len(own))
        found.append(
            Carried(
                tuple(more),
                _numbers(own.mean(axis=0)),
                _numbers(deviation),
                _numbers(_predicted(told, more, float(told.width), is_reset)),
                _numbers(_predicted(told, more, told.effective_width, is_reset)),
                _numbers(_from_keys(given, head, more, told.prior_variance, is_reset)),
            )
        )
    return found


def _numbers(array: Any) -> tuple[float, ...]:
    return tuple(float(number) for number in array)


def _measured(mixer: SequenceMixer, given: dict[str, Any]) -> Float[np.ndarray, "row head pair"]:
    """Weight of the first pair after each further one, of the head itself: values are 1, then 0."""
    memory = mixer.memory
    names = [name for name in memory.inputs if name not in ("value", "query")]
    rows, pairs = given["key"].shape[:2]
    first = np.zeros((pairs, memory.value_width), np.float32)
    first[0] = 1.0

    def one(parts, asked):
        query = jnp.broadcast_to(asked, (pairs, *asked.shape))
        u = {**parts, "value": jnp.asarray(first), "query": query}
        return memory(u, memory.init_state())[0].mean[:, 0]

    each = jax.jit(jax.vmap(jax.vmap(one, in_axes=(1, 0))))
    parts = {name: jnp.asarray(given[name], jnp.float32) for name in names}
    lengths = np.linalg.norm(given["asked"], axis=-1)
    weights = np.asarray(each(parts, jnp.asarray(given["asked"], jnp.float32)), float)
    assert weights.shape == (rows, mixer.heads, pairs)
    return weights / lengths[..., None]


def _predicted(told: Effective, more: Sequence[int], width: float, is_reset: bool):
    """In units of the prior variance; the width need not be a whole number."""
    noise, drift = told.noise / told.prior_variance, told.drift / told.prior_variance
    for count in more:
        if is_reset:
            kept = told.decay * (1 - told.gain / width)
            yield told.alignment * told.gain * kept**count
        else:
            crowd = retrieval.forgetting_crowd(
                1, count, width, noise, decay=told.decay, drift=drift
            )
            yield told.alignment * crowd.retention


def _from_keys(given, head: int, more: Sequence[int], prior: float, is_reset: bool):
    """From every row's own keys and gates: dual form, or the delta rule read backward."""
    keys, noises = given["key"][:, :, head], given["noise"][:, :, head] / prior
    asked = given["asked"][:, head]
    asked = asked / np.linalg.norm(asked, axis=-1, keepdims=True)
    shape = keys.shape[:2]
    decays = np.exp(given["log_decay"][:, :, head]) if "log_decay" in given else np.ones(shape)
    drifts = given["drift"][:, :, head] / prior if "drift" in given else np.zeros(shape)
    for count in more:
        weights = [
            _first_weight(
                keys[row, : count + 1],
                asked[row],
                noises[row, : count + 1],
                decays[row, : count + 1],
                drifts[row, : count + 1],
                is_reset,
            )
            for row in range(len(keys))
        ]
        yield np.mean(weights)


def _first_weight(keys, query, noises, decays, drifts, is_reset: bool) -> float:
    if is_reset:
        left = query
        for key, noise, decay in zip(keys[:0:-1], noises[:0:-1], decays[:0:-1], strict=True):
            left = decay * (left - (key @ left) / (key @ key + noise) * key)
        return (keys[0] @ left) / (keys[0] @ keys[0] + noises[0])
    weights, _ = retrieval.exact_weights(keys, query, noises, _time_covariance(decays, drifts))
    return float(weights[0])


def _time_covariance(decays, drifts):
    """As `retrieval.prior_covariance`, of decays and drifts that change."""
    variances, variance = [], 1.0
    for decay, drift in zip(decays, drifts, strict=True):
        variance = decay**2 * variance + drift
        variances.append(variance)
    logs = np.cumsum(np.log(decays))
    place = np.arange(len(logs))
    faded = np.exp(-np.abs(np.subtract.outer(logs, logs)))
    return faded * np.array(variances)[np.minimum.outer(place, place)]
