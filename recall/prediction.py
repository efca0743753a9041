"""What a layer of the catalogue will keep in a regime of the user's: predicted, and simulated.

A target is written n times with a random unit key, and N others are written with random keys, or
all with one key of a given cosine to the target's. Predictions are `inference.retrieval`'s, of what
the layer takes: the decay and drift of the regime where it has gates for them. Simulations run the
layer itself. Squared errors are of values that the regime's own model draws.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from design_models import ModelError
from inference import retrieval
from inference.retrieval import TwoKeys

from .collisions.curves import Axis, Claim, Curve
from .collisions.kinds import Kind, kind, own_decay
from .collisions.readings import Forgetting, Script, gates, read

Order = Literal["after", "before", "alternate"]
ORDERS = ("after", "before", "alternate")
QUANTITIES = ("retention", "intrusion", "stated variance", "squared error")


@dataclass(frozen=True)
class Regime:
    """What is written and read.

    Args:
        writes: n, of the target; of each of the two where they alternate.
        distractors: N, writes of others.
        overlap: cosine of one other key to the target's; None for a random key each.
        decay: a, at every write.
        drift: q, at every write.
        noise: ρ, noise variance over prior variance.
        width: K, entries of keys.
        order: of the others: after the target, before it, or in turn with it.
    """

    writes: int = 1
    distractors: int = 64
    overlap: float | None = None
    decay: float = 1.0
    drift: float = 0.0
    noise: float = 0.1
    width: int = 64
    order: Order = "after"

    def __post_init__(self) -> None:
        if self.order == "alternate" and self.overlap is None:
            raise ModelError(
                '`--order` is "alternate", which is of two keys: give their cosine with --overlap.'
            )

    @property
    def forgets(self) -> bool:
        return (self.decay, self.drift) != (1.0, 0.0)

    @property
    def counts(self) -> list[int]:
        """Of others (of cycles, where they alternate): 0 and powers of two up to all."""
        most = self.writes if self.order == "alternate" else self.distractors
        powers = [2**power for power in range(most.bit_length()) if 2**power < most]
        return [*([0] if self.order != "alternate" else []), *powers, *([most] if most else [])]


def forecast(layer: str, regime: Regime, draws: int, seed: int) -> list[Curve]:
    """Curves of a layer, along the number of others (or cycles), and of writes.

    Args:
        layer: its name.
        regime: what is written and read.
        draws: of keys.
        seed: of these.

    Raises:
        ModelError: the catalogue has no such layer.
    """
    expected, claim = _predictor(layer, regime)
    script, own = _script(regime, draws, seed)
    found = read(layer, script, Forgetting(regime.decay, regime.drift))
    cases = len(regime.counts)
    shape = (draws, cases)
    weights = found.weights.reshape(draws, cases, -1)
    measured = {
        "retention": np.sum(weights * own, axis=-1),
        "intrusion": np.sum(weights * ~own, axis=-1),
        "stated variance": found.variance.reshape(shape),
        "squared error": _errors(found.weights, script, regime).reshape(shape),
    }
    if regime.overlap is None:
        measured["intrusion"] = np.sum(weights**2 * ~own, axis=-1)
    name = "cycles" if regime.order == "alternate" else "others"
    along = Axis("predict", regime.order, name, tuple(map(float, regime.counts)))
    told = [expected(count) for count in regime.counts]
    curves = []
    for quantity, numbers in measured.items():
        form = [one.get(quantity) for one in told]
        has_form = all(number is not None for number in form)
        predicted = np.array(form, float) if has_form else None
        curves.append(along.curve(layer, quantity, numbers, predicted, claim))
    if regime.writes > 1 and regime.order == "after":
        curves.append(_gains(layer, regime, draws, seed))
    return curves


def _gains(layer: str, regime: Regime, draws: int, seed: int) -> Curve:
    """Gain of the target's last write, by how many there were, without others."""
    powers = [2**power for power in range(regime.writes.bit_length())]
    counts = sorted({*(power for power in powers if power < regime.writes), regime.writes})
    target = _unit(np.random.default_rng(seed).normal(size=(draws, 1, regime.width)))
    key = np.repeat(np.repeat(target, len(counts), axis=0), regime.writes, axis=1)
    written = np.tile(np.arange(regime.writes) < np.array(counts)[:, None], (draws, 1))
    script = Script(key, np.full(written.shape, regime.noise), written, key[:, 0])
    weights = read(layer, script, Forgetting(regime.decay, regime.drift)).weights
    last = weights.reshape(draws, len(counts), -1)[:, np.arange(len(counts)), np.array(counts) - 1]
    gains = own_gains(layer, regime.writes, regime)
    predicted = None if gains is None else gains[np.array(counts) - 1]
    along = Axis("predict", regime.order, "writes", tuple(map(float, counts)))
    return along.curve(layer, "gain", last, predicted, "algebra")


# -- what is simulated -----------------------------------------------------------------------------


def _script(regime: Regime, draws: int, seed: int) -> tuple[Script, Bool[np.ndarray, " write"]]:
    """Every count of others as a choice of positions of one sequence; which are the target's."""
    rng, counts = np.random.default_rng(seed), np.array(regime.counts)
    own = _own(regime, regime.distractors)
    target = _unit(rng.normal(size=(draws, 1, regime.width)))
    if regime.overlap is None:
        others = _unit(rng.normal(size=(draws, len(own), regime.width)))
    else:
        apart = rng.normal(size=(draws, 1, regime.width))
        apart -= np.sum(apart * target, axis=-1, keepdims=True) * target
        apart = _unit(apart)
        others = regime.overlap * target + np.sqrt(1 - regime.overlap**2) * apart
    keys = np.where(own[:, None], target, others)
    place = np.cumsum(~own)  # the how-manieth of the others a position is
    if regime.order == "alternate":
        written = np.arange(len(own)) < 2 * counts[:, None]
    else:
        written = own | (place <= counts[:, None])
    flat = np.repeat(keys, len(counts), axis=0)
    noise = np.full(flat.shape[:2], regime.noise)
    query = np.repeat(target[:, 0], len(counts), axis=0)
    return Script(flat, noise, np.tile(written, (draws, 1)), query), own


def _own(regime: Regime, others: int) -> Bool[np.ndarray, " write"]:
    """Which of all writes are the target's."""
    if regime.order == "alternate":
        return np.tile([True, False], regime.writes)
    own = np.arange(regime.writes + others) < regime.writes
    return own[::-1] if regime.order == "before" else own


def _errors(weights, script: Script, regime: Regime) -> Float[np.ndarray, " case"]:
    """Of values that the regime's model draws, in expectation over these."""
    found = []
    for own, key, noise, written, query in zip(weights, *script, strict=True):
        if not written.any():
            found.append(1.0)
            continue
        prior = retrieval.prior_covariance(int(written.sum()), regime.decay, regime.drift)
        found.append(retrieval.read_error(own[written], key[written], query, noise[written], prior))
    return np.array(found)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


# -- what is predicted -----------------------------------------------------------------------------

Told = dict[str, float | None]
Predictor = Callable[[int], Told]
"""Number of others (or cycles) -> quantities."""


def own_gains(layer: str, writes: int, regime: Regime) -> Float[np.ndarray, " write"] | None:
    """Gains of a key that is written at every step; None where there is no form."""
    taken = gates(layer)
    if "rate" in taken:
        return retrieval.fading_gains(writes, regime.decay, regime.noise)
    decay, drift = _taken(layer, regime)
    match kind(layer):
        case Kind.EXACT | Kind.COUNTED:
            return retrieval.forgetting_gains(writes, decay, drift, regime.noise)
        case Kind.RESET | Kind.RESET_ENTRIES if writes == 1 or kind(layer) is Kind.RESET:
            return retrieval.reset_gains(writes, regime.noise)
        case Kind.SUPERPOSED:
            return np.ones(writes)
        case _:
            return None


def _taken(layer: str, regime: Regime) -> tuple[float, float]:
    """Decay and drift as the layer has them."""
    taken = gates(layer)
    decay = own_decay(layer)
    if decay == 1 and "log_decay" in taken:
        decay = regime.decay
    return decay, regime.drift if "drift" in taken else 0.0


def _predictor(layer: str, regime: Regime) -> tuple[Predictor, Claim]:
    is_crowd = regime.overlap is None
    match kind(layer):
        case Kind.EXACT if is_crowd:
            return (lambda count: _exact_crowd(layer, regime, count)), "wide keys"
        case Kind.EXACT:
            return (lambda count: _exact_pair(layer, regime, count)), "algebra"
        case Kind.RESET | Kind.COUNTED | Kind.SUPERPOSED if is_crowd:
            return (lambda count: _corrected_crowd(layer, regime, count)), "expectation"
        case Kind.RESET | Kind.COUNTED | Kind.SUPERPOSED:
            return (lambda count: _corrected_pair(layer, regime, count)), "algebra"
        case Kind.RESET_ENTRIES if is_crowd and regime.writes == 1:
            return (lambda count: _reset_entries(regime, count)), "expectation"
        case _:
            return (lambda count: {}), "expectation"


def _exact_crowd(layer: str, regime: Regime, others: int) -> Told:
    last, fades = regime.order == "before", "rate" in gates(layer)
    decay, drift = _taken(layer, regime)
    case = (regime.writes, others, regime.width, regime.noise)
    if fades:
        found = retrieval.fading_crowd(*case, regime.decay, target_last=last)
    else:
        found = retrieval.forgetting_crowd(*case, decay=decay, drift=drift, target_last=last)
    is_own_model = (decay, drift) == (regime.decay, regime.drift)
    return {
        "retention": found.retention,
        "intrusion": found.intrusion,
        "stated variance": found.variance,
        "squared error": found.variance if is_own_model else None,
    }


def _exact_pair(layer: str, regime: Regime, count: int) -> Told:
    """In dual form: two keys span a plane."""
    own = _own(_with_cycles(regime, count), count)
    cosine = regime.overlap or 0.0
    pair = np.array([[1.0, 0.0], [cosine, np.sqrt(1 - cosine**2)]])
    keys, ages = pair[np.where(own, 0, 1)], np.arange(len(own))[::-1]
    decay, drift = _taken(layer, regime)
    rate = regime.decay if "rate" in gates(layer) else 1.0
    noises = regime.noise * rate ** -ages.astype(float)
    prior = retrieval.prior_covariance(len(own), decay, drift)
    weights, variance = retrieval.exact_weights(keys, pair[0], noises, prior)
    is_own_model = (decay, drift) == (regime.decay, regime.drift)
    return {
        "retention": float(weights[own].sum()),
        "intrusion": float(weights[~own].sum()),
        "stated variance": variance,
        "squared error": variance if is_own_model else None,
    }


def _corrected_crowd(layer: str, regime: Regime, others: int) -> Told:
    decay, _ = _taken(layer, regime)
    last, width = regime.order == "before", regime.width
    is_own_model = decay == regime.decay
    told: Told = {"stated variance": None, "squared error": None}
    if kind(layer) is Kind.SUPERPOSED:
        crowd = retrieval.superposed_crowd(
            others, width, decay, target_last=last, target=regime.writes
        )
        prior = retrieval.prior_covariance(regime.writes + others, regime.decay, regime.drift)
        told["squared error"] = retrieval.superposed_error(
            regime.writes, others, width, regime.noise, prior, decay, target_last=last
        )
    else:
        gains = own_gains(layer, regime.writes + others, regime)
        assert gains is not None
        own = _own(regime, others)
        target, rest = gains[own], gains[~own]
        crowd = retrieval.corrected_crowd(target, rest, width, target_last=last, decay=decay)
        if is_own_model:
            told["squared error"] = retrieval.corrected_error(
                target,
                rest,
                width,
                regime.noise,
                decay=decay,
                drift=regime.drift,
                target_last=last,
            )
        share = 1 / width if others and not last else 1.0
        told["stated variance"] = _stated(layer, gains, regime.noise, share)
    return {"retention": crowd.retention, "intrusion": crowd.intrusion, **told}


def _corrected_pair(layer: str, regime: Regime, count: int) -> Told:
    decay, _ = _taken(layer, regime)
    cosine = regime.overlap or 0.0
    writes = 2 * count if regime.order == "alternate" else regime.writes + count
    gains = own_gains(layer, writes, regime)
    assert gains is not None
    told: Told = {"squared error": None, "stated variance": None}
    if kind(layer) is not Kind.SUPERPOSED:
        share = (
            cosine**2 if regime.order == "alternate" or (regime.order == "after" and count) else 1
        )
        told["stated variance"] = _stated(layer, gains, regime.noise, float(share))
    if regime.order == "alternate":
        if kind(layer) is Kind.COUNTED:
            return told
        found = (
            retrieval.alternated_superposed(count, cosine, decay)
            if kind(layer) is Kind.SUPERPOSED
            else retrieval.alternated_reset(count, cosine, float(gains[0]), decay)
        )
        return {"retention": found.retention, "intrusion": found.intrusion, **told}
    case = TwoKeys(regime.writes, count, cosine, regime.order == "before")
    weights = (
        retrieval.superposed_two_keys(case, decay)
        if kind(layer) is Kind.SUPERPOSED
        else retrieval.corrected_two_keys(case, gains, decay)
    )
    return {"retention": weights.target, "intrusion": weights.other, **told}


def _stated(layer: str, gains, noise: float, share: float) -> float:
    """Variance after the last write, a share of whose squared length lies along the target's key.

    A reset covariance is I before it and keeps nothing of earlier ones; that of the isotropic
    Kalman Delta Network is one number, ρ g.
    """
    if kind(layer) is Kind.COUNTED:
        return float(noise * gains[-1])
    return float(1 - gains[-1] * share)


def _reset_entries(regime: Regime, others: int) -> Told:
    crowd = retrieval.reset_entry_crowd(
        others, regime.width, regime.noise, target_last=regime.order == "before"
    )
    return {"retention": crowd.retention, "intrusion": crowd.intrusion}


def _with_cycles(regime: Regime, count: int) -> Regime:
    return replace(regime, writes=count) if regime.order == "alternate" else regime


def without_form(curves: Sequence[Curve]) -> list[str]:
    """Quantities for which the layer has no closed form in this regime."""
    return [curve.quantity for curve in curves if curve.predicted is None]
