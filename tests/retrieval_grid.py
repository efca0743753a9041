"""Closed forms of retrieval against simulation, over a grid of regimes.

What is simulated shares no code with the forms: filters run over random keys, many draws at once.
The exact filter is simulated as kernel regression, which `test_retrieval` checks against the filter
step by step.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from inference import retrieval

Numbers = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """A closed form: what it predicts, what is simulated of it, and where.

    Args:
        name: of its functions.
        predict: settings -> quantities.
        simulate: (rng, draws, settings) -> quantities, one number a draw; a number alone where keys
            are not random.
        settings: of every regime.
    """

    name: str
    predict: Callable[..., Numbers]
    simulate: Callable[..., Numbers]
    settings: list[Numbers]


@dataclass(frozen=True)
class Comparison:
    """A quantity in one regime, predicted and measured."""

    form: str
    quantity: str
    regime: Numbers
    predicted: float
    measured: float
    standard_error: float

    @property
    def apart(self) -> float:
        """Relative error; without draws, where rounding is all there is, absolute below 1."""
        if not self.standard_error:
            return abs(self.predicted - self.measured) / max(1.0, abs(self.measured))
        return abs(self.predicted - self.measured) / abs(self.measured)

    @property
    def in_errors(self) -> float:
        """Error in standard errors; 0 where there are none."""
        if not self.standard_error:
            return 0.0
        return abs(self.predicted - self.measured) / self.standard_error

    @property
    def holds(self) -> bool:
        """Within 1 %, or 3 standard errors where these are more; to rounding without draws."""
        if not self.standard_error:
            return self.apart < 1e-11
        return self.apart < 0.01 or self.in_errors < 3


def compare(draws: int, seed: int) -> Iterator[list[Comparison]]:
    """Every regime of the grid, one after the other.

    What does not hold is drawn once more, ten times as often: of a thousand comparisons some are
    beyond three standard errors by chance, and hardly any are so again.
    """
    for place, form in enumerate(FORMS):
        for number, regime in enumerate(form.settings):
            found = _in_regime(form, regime, draws, [seed, place, number])
            if not all(one.holds for one in found):
                found = _in_regime(form, regime, 10 * draws, [seed + 1, place, number])
            yield found


def _in_regime(form: Form, regime: Numbers, draws: int, seed: list[int]) -> list[Comparison]:
    predicted = form.predict(**regime)
    measured = form.simulate(np.random.default_rng(seed), draws, **regime)
    return [
        _compared(form.name, name, regime, predicted[name], np.atleast_1d(measured[name]))
        for name in predicted
    ]


def _compared(form, quantity, regime, predicted, measured) -> Comparison:
    error = measured.std(ddof=1) / np.sqrt(len(measured)) if len(measured) > 1 else 0.0
    return Comparison(
        form, quantity, regime, float(predicted), float(measured.mean()), float(error)
    )


def _all(**choices: tuple) -> list[Numbers]:
    return [dict(zip(choices, chosen, strict=True)) for chosen in product(*choices.values())]


# -- simulations -------------------------------------------------------------------------------


def _keys(rng, draws: int, writes: int, width: int, own: np.ndarray) -> np.ndarray:
    """Random unit keys; all of the target's writes have one."""
    keys = rng.normal(size=(draws, writes, width))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    if own.any():
        keys[:, own] = keys[:, [np.flatnonzero(own)[0]]]
    return keys


def _own(target: int, others: int, last: bool) -> np.ndarray:
    first = [not last] * (others if last else target)
    return np.array(first + [last] * (target if last else others))


def _prior(writes: int, decay: float, drift: float) -> np.ndarray:
    """Covariance in time, step by step."""
    covariance, variance = np.zeros((writes, writes)), 1.0
    for now in range(writes):
        variance = decay**2 * variance + drift
        if now:
            covariance[now, :now] = covariance[:now, now] = decay * covariance[now - 1, :now]
        covariance[now, now] = variance
    return covariance


def kernel_weights(keys, query, noises, covariance) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the exact filter, and its variance, of every draw."""
    gram = covariance * (keys @ keys.swapaxes(1, 2)) + np.diag(noises)
    shown = covariance[-1] * np.einsum("dwk,dk->dw", keys, query)
    weights = np.linalg.solve(gram, shown[..., None])[..., 0]
    return weights, covariance[-1, -1] - np.sum(shown * weights, axis=1)


def delta_weights(keys, query, gains, decay: float) -> np.ndarray:
    """Weights of a delta rule, read backward: M → a M (I − g k kᵀ) + g v kᵀ."""
    left, weights = query.copy(), np.zeros(keys.shape[:2])
    for place in range(keys.shape[1])[::-1]:
        along = np.sum(keys[:, place] * left, axis=1)
        weights[:, place] = gains[place] * along
        left = decay * (left - gains[place] * along[:, None] * keys[:, place])
    return weights


def additive_weights(keys, query, decay: float) -> np.ndarray:
    """Weights where values are added."""
    ages = np.arange(keys.shape[1])[::-1]
    return np.einsum("dwk,dk->dw", keys, query) * decay**ages


def _error(weights, keys, query, noise: float, covariance) -> np.ndarray:
    """Of values drawn from the model, in expectation over these."""
    gram = covariance * (keys @ keys.swapaxes(1, 2))
    shown = covariance[-1] * np.einsum("dwk,dk->dw", keys, query)
    both = np.einsum("dw,dwx,dx->d", weights, gram, weights)
    return (
        covariance[-1, -1] - 2 * np.sum(weights * shown, axis=1) + both + noise * _squares(weights)
    )


def _squares(weights) -> np.ndarray:
    return np.sum(weights**2, axis=1)


def _crowded(weights, own, variance=None) -> Numbers:
    found = {
        "retention": weights[:, own].sum(axis=1),
        "intrusion": _squares(weights[:, ~own]),
    }
    return found if variance is None else found | {"variance": variance}


# -- forms: predicted and simulated ----------------------------------------------------------------


def _exact_crowd(target, others, width, noise):
    found = retrieval.exact_crowd(others, width, noise, target)
    return found._asdict() | {"variance": noise * found.retention / target}


def _simulated_exact(rng, draws, target, others, width, noise, decay=1.0, drift=0.0, last=False):
    own = _own(target, others, last)
    keys = _keys(rng, draws, len(own), width, own)
    query = keys[:, np.flatnonzero(own)[0]]
    noises, covariance = np.full(len(own), noise), _prior(len(own), decay, drift)
    weights, variance = kernel_weights(keys, query, noises, covariance)
    return _crowded(weights, own, variance)


def _forgetting_crowd(target, others, width, noise, decay, drift, last):
    return retrieval.forgetting_crowd(
        target, others, width, noise, decay=decay, drift=drift, target_last=last
    )._asdict()


def _capacity(share, width, noise):
    return {"share left": share}


def _simulated_capacity(rng, draws, share, width, noise):
    others = retrieval.capacity(share, width, noise)
    fewer, more = (
        _simulated_exact(rng, draws, 1, count, width, noise)["retention"]
        for count in (int(others), int(others) + 1)
    )
    return {"share left": (fewer + (others % 1) * (more - fewer)) * (1 + noise)}


def _fading_crowd(target, others, width, noise, rate, last):
    return retrieval.fading_crowd(target, others, width, noise, rate, target_last=last)._asdict()


def _simulated_fading(rng, draws, target, others, width, noise, rate, last):
    own = _own(target, others, last)
    keys = _keys(rng, draws, len(own), width, own)
    noises = noise / rate ** np.arange(len(own))[::-1]
    query = keys[:, np.flatnonzero(own)[0]]
    weights, variance = kernel_weights(keys, query, noises, np.ones((len(own), len(own))))
    return _crowded(weights, own, variance)


def _unequal_crowd(others, width, clean, noisy):
    noises = np.array([clean, *[clean, noisy] * (others // 2)])
    covariance, own = np.ones((len(noises), len(noises))), np.arange(len(noises)) == 0
    return retrieval.exact_stream(covariance, own, noises, width)._asdict()


def _simulated_unequal(rng, draws, others, width, clean, noisy):
    noises = np.array([clean, *[clean, noisy] * (others // 2)])
    own = np.arange(len(noises)) == 0
    keys = _keys(rng, draws, len(noises), width, own)
    weights, variance = kernel_weights(keys, keys[:, 0], noises, np.ones((len(own), len(own))))
    return _crowded(weights, own, variance)


def _exact_overload(pairs, width, noise, assumed):
    error, stated = retrieval.exact_overload(pairs, width, noise, assumed)
    return {"error": error, "stated": stated}


def _simulated_overload(rng, draws, pairs, width, noise, assumed):
    keys = _keys(rng, draws, pairs, width, np.zeros(pairs, bool))
    precision = np.eye(width) + keys.swapaxes(1, 2) @ keys / assumed
    covariance = np.linalg.inv(precision)  # averaged over all queries at once
    bias = np.einsum("dij,dji->d", covariance, covariance) / width
    stated = np.einsum("dii->d", covariance) / width
    return {"error": bias + noise / assumed * (stated - bias), "stated": stated}


def _gains(count: int, noise: float) -> np.ndarray:
    return np.full(count, 1 / (1 + noise))


def _reset_crowd(target, others, width, noise, decay, last):
    own, rest = _gains(target, noise), _gains(others, noise)
    drift = 1 - decay**2
    crowd = retrieval.corrected_crowd(own, rest, width, target_last=last, decay=decay)
    error = retrieval.corrected_error(
        own, rest, width, noise, decay=decay, drift=drift, target_last=last
    )
    return crowd._asdict() | {"error": error}


def _simulated_reset(rng, draws, target, others, width, noise, decay, last):
    own = _own(target, others, last)
    keys = _keys(rng, draws, len(own), width, own)
    query = keys[:, np.flatnonzero(own)[0]]
    weights = delta_weights(keys, query, _gains(len(own), noise), decay)
    covariance = _prior(len(own), decay, 1 - decay**2)
    return _crowded(weights, own) | {"error": _error(weights, keys, query, noise, covariance)}


def _counted_crowd(others, width, noise, last):
    gains = retrieval.counted_gains(others + 1, noise)
    own, rest = (gains[-1:], gains[:-1]) if last else (gains[:1], gains[1:])
    return retrieval.corrected_crowd(own, rest, width, target_last=last)._asdict()


def _simulated_counted(rng, draws, others, width, noise, last):
    own = _own(1, others, last)
    keys = _keys(rng, draws, len(own), width, own)
    gains = np.array([1 / (place + 1 + noise) for place in range(len(own))])
    return _crowded(delta_weights(keys, keys[:, np.flatnonzero(own)[0]], gains, 1.0), own)


def _superposed_crowd(target, others, width, noise, decay, last):
    crowd = retrieval.superposed_crowd(others, width, decay, target_last=last, target=target)
    covariance = retrieval.prior_covariance(target + others, decay, 1 - decay**2)
    error = retrieval.superposed_error(
        target, others, width, noise, covariance, decay, target_last=last
    )
    return crowd._asdict() | {"error": error}


def _simulated_superposed(rng, draws, target, others, width, noise, decay, last):
    own = _own(target, others, last)
    keys = _keys(rng, draws, len(own), width, own)
    query = keys[:, np.flatnonzero(own)[0]]
    weights = additive_weights(keys, query, decay)
    covariance = _prior(len(own), decay, 1 - decay**2)
    error = _error(weights, keys, query, noise, covariance)
    return _crowded(weights, own) | {"error": error}


def _overloads(pairs, width, noise):
    gain = 1 / (1 + noise)
    stored = retrieval.reset_stored_error(pairs, width, noise, gain)
    return {
        "reset, new": retrieval.reset_overload(pairs, width, noise, gain),
        "reset, first stored": stored[-1],
        "reset, stored": stored.mean(),
        "additive, new": retrieval.superposed_overload(pairs, width, noise),
    }


def _simulated_overloads(rng, draws, pairs, width, noise):
    keys = _keys(rng, draws, pairs, width, np.zeros(pairs, bool))
    gain = 1 / (1 + noise)
    read, gathered = np.zeros((draws, pairs, width)), np.zeros((draws, width, width))
    for place in range(pairs):  # read[i] is the row that value i has left in the memory
        key = keys[:, place]
        for rows in (read, gathered):
            rows -= gain * np.einsum("dik,dk->di", rows, key)[..., None] * key[:, None]
        read[:, place] += gain * key
        gathered += gain * key[:, :, None] * key[:, None]
    error = np.eye(width) - gathered
    new = (np.sum(error**2, axis=(1, 2)) + noise * np.sum(read**2, axis=(1, 2))) / width
    stored = np.sum(np.einsum("dij,dwj->dwi", error, keys) ** 2, axis=2)
    stored += noise * np.sum(np.einsum("dik,dwk->dwi", read, keys) ** 2, axis=2)
    gram = keys.swapaxes(1, 2) @ keys - np.eye(width)
    added = np.sum(gram**2, axis=(1, 2)) / width + noise * pairs / width
    return {
        "reset, new": new,
        "reset, first stored": stored[:, 0],
        "reset, stored": stored.mean(axis=1),
        "additive, new": added,
    }


def _one_key(writes, decay, drift, noise):
    gains = retrieval.forgetting_gains(writes, decay, drift, noise)
    weights = retrieval.gain_weights(gains, decay)
    return {
        "gain": gains[-1],
        "old": weights[0],
        "new": weights[-1],
        "plateau": retrieval.plateau_gain(decay, drift, noise) if drift else gains[-1],
        "relaxed": retrieval.relaxed_variance(float(noise * gains[-1]), 7.0, decay, drift),
    }


def _simulated_one_key(rng, draws, writes, decay, drift, noise):
    def run(count):
        variance, gains = 1.0, []
        for _ in range(count):
            variance = decay**2 * variance + drift
            gains.append(variance / (variance + noise))
            variance *= 1 - gains[-1]
        return np.array(gains), variance

    gains, variance = run(writes)
    key = np.ones((1, writes, 1))
    weights = delta_weights(key, key[:, 0], gains, decay)[0]
    for _ in range(7):
        variance = decay**2 * variance + drift
    plateau = run(5000)[0][-1] if drift else gains[-1]
    return {
        "gain": gains[-1],
        "old": weights[0],
        "new": weights[-1],
        "plateau": plateau,
        "relaxed": variance,
    }


def _pair(target, other, overlap, last, turns):
    """Keys in a plane, and which writes are the target's."""
    first = np.array([True, False] * target) if turns else _own(target, other, last)
    keys = np.array([[1.0, 0.0], [overlap, np.sqrt(1 - overlap**2)]])
    return keys[np.where(first, 0, 1)][None], first


def _two_keys(target, other, overlap, noise, decay, last):
    case = retrieval.TwoKeys(target, other, overlap, last)
    gains = _gains(target + other, noise)
    reset = retrieval.corrected_two_keys(case, gains, decay)
    added = retrieval.superposed_two_keys(case, decay)
    exact = retrieval.exact_two_keys(case, noise)
    named = {"reset": reset, "additive": added, "exact": exact}
    return {
        f"{name}, {part}": weight
        for name, weights in named.items()
        for part, weight in zip(("retention", "intrusion"), weights, strict=True)
    }


def _simulated_two_keys(rng, draws, target, other, overlap, noise, decay, last):
    keys, own = _pair(target, other, overlap, last, False)
    query, count = np.array([[1.0, 0.0]]), len(own)
    named = {
        "reset": delta_weights(keys, query, _gains(count, noise), decay),
        "additive": additive_weights(keys, query, decay),
        "exact": kernel_weights(keys, query, np.full(count, noise), np.ones((count, count)))[0],
    }
    return {
        f"{name}, {part}": weights[0][which].sum()
        for name, weights in named.items()
        for part, which in (("retention", own), ("intrusion", ~own))
    }


def _alternation(cycles, overlap, noise, decay):
    gain = 1 / (1 + noise)
    named = {
        "reset": retrieval.alternated_reset(cycles, overlap, gain, decay),
        "additive": retrieval.alternated_superposed(cycles, overlap, decay),
        "exact": retrieval.alternated_exact(cycles, overlap, noise),
    }
    return {
        f"{name}, {part}": weight
        for name, weights in named.items()
        for part, weight in weights._asdict().items()
    }


def _simulated_alternation(rng, draws, cycles, overlap, noise, decay):
    keys, own = _pair(cycles, cycles, overlap, False, True)
    query, count = np.array([[1.0, 0.0]]), len(own)
    named = {
        "reset": delta_weights(keys, query, _gains(count, noise), decay),
        "additive": additive_weights(keys, query, decay),
        "exact": kernel_weights(keys, query, np.full(count, noise), np.ones((count, count)))[0],
    }
    return {
        f"{name}, {part}": number
        for name, (weights,) in named.items()
        for part, number in (
            ("retention", weights[own].sum()),
            ("intrusion", weights[~own].sum()),
            ("noise", weights @ weights),
        )
    }


def _forgetting(settings: list[Numbers]) -> list[Numbers]:
    """Each with several decays and drifts."""
    paths = ((1.0, 0.02), (0.99, 1 - 0.99**2), (0.97, 0.0), (0.9, 0.1))
    return [one | {"decay": decay, "drift": drift} for one in settings for decay, drift in paths]


def _loads(widths: tuple, loads: tuple, name: str = "others") -> list[Numbers]:
    return [{"width": width, name: round(load * width)} for width in widths for load in loads]


def _with(settings: list[Numbers], **choices: tuple) -> list[Numbers]:
    return [one | other for one in settings for other in _all(**choices)]


BOTH = (False, True)
FORMS = [
    Form(
        "exact_crowd",
        _exact_crowd,
        _simulated_exact,
        _with(_loads((16, 32), (0.5, 1, 2)), noise=(0.1, 0.3, 1.0), target=(1, 4)),
    ),
    Form(
        "forgetting_crowd",
        _forgetting_crowd,
        _simulated_exact,
        _forgetting(
            _with(_loads((16, 32), (0.5, 1.5)), noise=(0.1, 0.5), target=(1, 3), last=BOTH)
        ),
    ),
    Form(
        "fading_crowd",
        _fading_crowd,
        _simulated_fading,
        _with(_loads((16,), (0.5, 1.5)), noise=(0.1, 0.5), target=(1,), rate=(0.98,), last=BOTH),
    ),
    Form(
        "exact_stream",
        _unequal_crowd,
        _simulated_unequal,
        _with(_loads((16,), (0.5, 1.5)), clean=(0.1, 0.3), noisy=(1.0, 4.0)),
    ),
    Form(
        "exact_overload",
        _exact_overload,
        _simulated_overload,
        _with(_loads((16, 32), (0.5, 1, 2), "pairs"), noise=(0.1, 0.5), assumed=(0.1, 0.5)),
    ),
    Form(
        "corrected_crowd, corrected_error",
        _reset_crowd,
        _simulated_reset,
        _with(
            _loads((16,), (0.5, 2)), noise=(0.1, 1.0), target=(1, 3), decay=(1.0, 0.98), last=BOTH
        ),
    ),
    Form(
        "corrected_crowd of counted_gains",
        _counted_crowd,
        _simulated_counted,
        _with(_loads((16,), (0.5, 2)), noise=(0.1, 1.0), last=BOTH),
    ),
    Form(
        "superposed_crowd, superposed_error",
        _superposed_crowd,
        _simulated_superposed,
        _with(_loads((16,), (0.5, 2)), noise=(0.5,), target=(1, 3), decay=(1.0, 0.98), last=BOTH),
    ),
    Form(
        "reset_overload, reset_stored_error, superposed_overload",
        _overloads,
        _simulated_overloads,
        _with(_loads((16,), (0.5, 1, 2), "pairs"), noise=(0.1, 0.5)),
    ),
    Form(
        "forgetting_gains, plateau_gain, gain_weights, relaxed_variance",
        _one_key,
        _simulated_one_key,
        _all(writes=(1, 6, 30), decay=(1.0, 0.9), drift=(0.0, 0.05), noise=(0.1, 1.0)),
    ),
    Form(
        "exact_two_keys, corrected_two_keys, superposed_two_keys",
        _two_keys,
        _simulated_two_keys,
        _all(
            target=(1, 4),
            other=(1, 9),
            overlap=(0.3, 0.9),
            noise=(0.1,),
            decay=(1.0, 0.95),
            last=BOTH,
        ),
    ),
    Form(
        "alternated_exact, alternated_reset, alternated_superposed",
        _alternation,
        _simulated_alternation,
        _all(cycles=(1, 3, 12), overlap=(0.3, 0.7, 0.95), noise=(0.01, 0.5), decay=(1.0, 0.97)),
    ),
]
FORMS.append(
    Form(
        "capacity",
        _capacity,
        _simulated_capacity,
        _all(share=(0.75, 0.5, 0.25), width=(64,), noise=(0.1, 0.5)),
    )
)
REGIMES = sum(len(form.settings) for form in FORMS)
