# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How memories forget
#
# Can one say *before training* what a memory will keep? A design model says what is assumed; its
# filter follows; and of the filter, closed forms follow. Here they are set against simulation.
#
# **The model.** A memory that decays and drifts, seen through noise, with keys of length 1:
#
# $$ S_t = a S_{t-1} + N(0, q), \qquad v_t = S_t k_t + N(0, r), \qquad S_0 \sim N(0, 1). $$
#
# **The memory, in ten lines of NumPy.** The delta rule is the same with its covariance reset to
# the prior before every write. Values enter linearly, so a memory is known by the *weights* of
# what was written in what it answers: how much of each value is left. `remember` follows weights,
# not values.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from inference.retrieval import (
    TwoKeys,
    corrected_crowd,
    corrected_two_keys,
    counted_gains,
    exact_crowd,
    exact_two_keys,
    forgetting_gains,
    overwritten_half_life,
    plateau_gain,
    reset_gains,
    settling_rate,
)
from layers import Stream, filter_scan
from layers.rules import Reset

jax.config.update("jax_enable_x64", True)
plt.style.use("talk.mplstyle")
rng = np.random.default_rng(0)
NOISE, KEY = 0.1, 64


def remember(keys, query, *, reset=False, decay=1.0, drift=0.0):
    """Gains along the keys, and weights of all values in the answer to the query."""
    identity = np.eye(keys.shape[1])
    P, M, gains = identity, np.zeros((len(keys), keys.shape[1])), []
    for t, k in enumerate(keys):
        P = identity if reset else decay**2 * P + drift * identity
        s = k @ P @ k + NOISE
        g = P @ k / s
        M = decay * M
        M[t] += 1  # a value of its own for every write
        M[t], M[:t], P = g, M[:t] - np.outer(M[:t] @ k, g), P - s * np.outer(g, g)
        gains.append(k @ g)
    return np.array(gains), M @ query


def units(count, width=KEY):
    drawn = rng.normal(size=(count, width))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


# %% [markdown]
# **An oracle.** The library's compiled scan, given one-hot values, must answer with the same
# weights.

# %%
keys = units(12)
for reset in (False, True):
    written = (jnp.asarray(keys), jnp.eye(12), jnp.tile(keys[0], (12, 1)), jnp.full(12, NOISE))
    rule = {"rule": Reset()} if reset else {}
    _, reading = filter_scan(Stream(*written), algorithm="token", **rule)
    gap = np.max(np.abs(np.asarray(reading.mean[-1]) - remember(keys, keys[0], reset=reset)[1]))
    print(f"{'delta rule' if reset else 'exact filter':12s} differs by {gap:.1e}")
    assert gap < 1e-12

# %% [markdown]
# ## How much a new value counts
#
# **Predicted.** Write one key again and again. What the exact filter learns from its $n$-th value
# falls as $1/(n + r)$: evidence accumulates, and confidence with it. With decay and drift, old
# evidence goes stale, and the gain settles where the two balance: with $p$ the positive root of
#
# $$ a^2 p^2 + (q + r (1 - a^2))\,p - q r = 0, \qquad g_\infty = \frac{a^2 p + q}{a^2 p + q + r}. $$
#
# The delta rule's gain $1/(1 + r)$ never moves.

# %%
WRITES = 200
steps = np.arange(1, WRITES + 1)
shown = np.unique(np.geomspace(1, WRITES, 14).astype(int))
same = np.tile(units(1, 4), (WRITES, 1))
DRIFTS = {"drift 0.01": (1.0, 0.01), "decay 0.9, drift 0.01": (0.9, 0.01)}
figure, axis = plt.subplots()
axis.plot(steps, reset_gains(WRITES, NOISE), color="C1", label="delta rule")
axis.plot(steps, counted_gains(WRITES, NOISE), color="C0", label="exact filter, nothing forgotten")
worst = [
    np.max(np.abs(remember(same, same[0], reset=True)[0] - reset_gains(WRITES, NOISE))),
    np.max(np.abs(remember(same, same[0])[0] - counted_gains(WRITES, NOISE))),
]
axis.plot(shown, remember(same, same[0], reset=True)[0][shown - 1], "o", color="C1")
axis.plot(shown, remember(same, same[0])[0][shown - 1], "o", color="C0")
for colour, (name, (decay, drift)) in zip(("C2", "C3"), DRIFTS.items(), strict=True):
    closed = forgetting_gains(WRITES, decay, drift, NOISE)
    simulated, _ = remember(same, same[0], decay=decay, drift=drift)
    axis.plot(steps, closed, color=colour, label=f"exact filter, {name}")
    axis.plot(shown, simulated[shown - 1], "o", color=colour)
    axis.axhline(plateau_gain(decay, drift, NOISE), color=colour, linestyle=":", linewidth=1)
    worst.append(np.max(np.abs(simulated - closed)))
    assert abs(simulated[-1] - plateau_gain(decay, drift, NOISE)) < 1e-3
axis.set(xscale="log", yscale="log", xlabel="writes of one key", ylabel="gain of the last write")
axis.set_title("Evidence accumulates until forgetting balances it")
axis.legend(loc="lower left")
plt.show()
print(f"largest difference of any gain from its closed form: {max(worst):.1e}")
assert max(worst) < 1e-12

# %% [markdown]
# ## What is left after others were written
#
# **Predicted.** One value is written, then $N$ others with random keys. Every write of the delta
# rule wipes out a share $\beta/K$ of what was there before, whatever it holds: an *exponential*,
#
# $$ \beta\,(1 - \beta/K)^N. $$
#
# The exact filter protects directions it is sure of, and shares what it has evenly among all:
# nearly everything is kept up to $N \approx K$, then a *power law*, $K/N$:
#
# $$ \frac{h}{1 + h}, \qquad r h^2 + (r + N/K - 1)\,h - 1 = 0. $$
#
# `exact_crowd` adds to this, the limit of wide keys, what keys of $K$ entries change about it.

# %%
crowds, draws = np.array([4, 8, 16, 32, 64, 128, 256, 512]), 12
ridge, wiped = np.zeros((draws, len(crowds))), np.zeros((draws, len(crowds)))
for draw in range(draws):
    target, others = units(1)[0], units(crowds[-1])
    left = target / (1 + NOISE)  # what the delta rule still holds of the target
    for n, key in enumerate(others, start=1):
        left = left - key * (key @ left) / (1 + NOISE)
        wiped[draw, crowds == n] = left @ target
    for column, n in enumerate(crowds):
        A = NOISE * np.eye(KEY) + others[:n].T @ others[:n]
        h = target @ np.linalg.solve(A, target)
        ridge[draw, column] = h / (1 + h)  # the filter's weight of the target, as ridge regression
print("the filter itself, 32 others:", end=" ")
weights = remember(np.concatenate([target[None], others[:32]]), target)[1]
print(f"{weights[0]:.6f}, as ridge regression {ridge[-1, crowds == 32][0]:.6f}")
assert abs(weights[0] - ridge[-1, crowds == 32][0]) < 1e-10

numbers = np.unique(np.geomspace(4, 512, 60).astype(int))
smooth = [exact_crowd(int(n), KEY, NOISE).retention for n in numbers]
beta = 1 / (1 + NOISE)
fading = [
    corrected_crowd(
        reset_gains(1, NOISE), reset_gains(int(n), NOISE), KEY, target_last=False
    ).retention
    for n in numbers
]
figure, axis = plt.subplots()
for found, closed, colour, name in (
    (ridge, smooth, "C0", "exact filter: a power law"),
    (wiped, fading, "C1", "delta rule: an exponential"),
):
    axis.plot(numbers, closed, color=colour, label=name)
    spread = 2 * np.std(found, axis=0) / np.sqrt(draws)
    axis.errorbar(crowds, np.mean(found, axis=0), spread, fmt="o", color=colour, capsize=3)
axis.plot(numbers[numbers > 100], KEY / numbers[numbers > 100], "k:", linewidth=1, label="K/N")
axis.axvline(KEY, color="0.6", linewidth=1)
axis.text(KEY * 1.05, 1.2e-3, "as many as\nthe key is wide", color="0.4")
axis.set(xscale="log", yscale="log", ylim=(1e-3, 1.5), xlabel="values written since")
axis.set(ylabel="share of the value that is left")
axis.set_title("Exact filters forget by a power law, delta rules exponentially")
axis.legend(loc="lower left")
plt.show()

exact_form = np.array([exact_crowd(int(n), KEY, NOISE).retention for n in crowds])
delta_form = beta * (1 - beta / KEY) ** crowds
for found, closed, name in ((ridge, exact_form, "exact"), (wiped, delta_form, "delta")):
    errors = np.std(found, axis=0, ddof=1) / np.sqrt(draws)
    z = np.max(np.abs(np.mean(found, axis=0) - closed) / (errors + 0.003 * closed))
    print(f"{name}: largest departure {z:.1f} standard errors")
    assert z < 4
assert np.mean(ridge, axis=0)[-1] > 0.1
assert np.mean(wiped, axis=0)[-1] < 0.002

# %% [markdown]
# ## Two keys that resemble each other
#
# **Predicted.** A value is written once; another is written $n$ times with a key of cosine 0.7.
# The delta rule believes every new value, and $1 - c^2$ of the old one is left. The exact filter
# has the weights of ridge regression: the two keys differ, and it works out who said what.

# %%
cosine, times = 0.7, np.unique(np.geomspace(1, 128, 10).astype(int))
pair = np.array([[1.0, 0.0], [cosine, np.sqrt(1 - cosine**2)]])
figure, axis = plt.subplots()
for reset, colour, name in ((False, "C0", "exact filter"), (True, "C1", "delta rule")):
    kept, intruded, forms = [], [], []
    for n in times:
        case = TwoKeys(1, int(n), cosine)
        forms.append(
            corrected_two_keys(case, reset_gains(int(n) + 1, NOISE))
            if reset
            else exact_two_keys(case, NOISE)
        )
        _, weights = remember(pair[[0] + [1] * n], pair[0], reset=reset)
        kept.append(weights[0])
        intruded.append(np.sum(weights[1:]))
    forms = np.array(forms)
    axis.plot(times, forms[:, 0], color=colour, label=f"{name}: old value left")
    axis.plot(times, forms[:, 1], "--", color=colour, label=f"{name}: new value intrudes")
    axis.plot(times, kept, "o", color=colour)
    axis.plot(times, intruded, "s", color=colour)
    gap = np.max(np.abs(forms - np.stack([kept, intruded], axis=1)))
    print(f"{name}: largest difference from the closed form {gap:.1e}")
    assert gap < 1e-12
axis.set(xscale="log", xlabel="writes of another value with a key of cosine 0.7", ylim=(0, 1))
axis.set(ylabel="weight in the answer")
axis.set_title("The delta rule mixes up similar keys, the exact filter tells them apart")
axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
figure.set_size_inches(9.5, 4)
plt.show()

# %% [markdown]
# ## The price, and how to pay it
#
# A memory that never forgets cannot be *told otherwise*: a value written 16 times takes 17 writes
# of another to outweigh. Decay and drift buy this back. **Predicted:** once the gain has settled
# at $g$, a write leaves $a (1 - g)$ of all before, so old values have a *half-life* $\log 2 /
# {-\log(a (1 - g))}$ in writes of their key, whatever their number.

# %%
OLD, NEW = 60, 12
for n, outweighs in ((16, False), (17, True)):
    _, weights = remember(same[: 16 + n], same[0])
    assert (np.sum(weights[16:]) > np.sum(weights[:16]) * (1 + 1e-9)) == outweighs
lives = {}
figure, axis = plt.subplots()
settings = {"nothing forgotten": (1.0, 0.0), **DRIFTS}
for colour, (name, (decay, drift)) in zip(("C0", "C2", "C3"), settings.items(), strict=True):
    left = []
    for n in range(NEW + 1):
        _, weights = remember(same[: OLD + n], same[0], decay=decay, drift=drift)
        left.append(np.sum(weights[:OLD]))
    left = np.array(left) / left[0]
    axis.plot(range(NEW + 1), left, "o", color=colour, label=name)
    if drift:
        rate = settling_rate(decay, drift, NOISE)
        factor, lives[name] = np.exp(-rate), overwritten_half_life(rate)
        assert abs(factor - decay * (1 - plateau_gain(decay, drift, NOISE))) < 1e-12
        axis.plot(range(NEW + 1), factor ** np.arange(NEW + 1), color=colour)
        np.testing.assert_allclose(left, factor ** np.arange(NEW + 1), atol=1e-3)
        print(f"{name}: half-life {lives[name]:.2f} writes")
    else:
        closed = (OLD + NOISE) / (OLD + np.arange(NEW + 1) + NOISE)
        axis.plot(range(NEW + 1), closed, color=colour)
        np.testing.assert_allclose(left, closed, atol=1e-10)
axis.axhline(0.5, color="0.6", linestyle="--", linewidth=1)
axis.text(NEW, 0.52, "half", color="0.4", ha="right")
axis.set(xlabel="writes of another value with the same key", ylim=(0, 1.02))
axis.set(ylabel="share of the old value that is left")
axis.set_title("Drift gives an old value a half-life")
axis.legend(loc="center right", bbox_to_anchor=(1, 0.68))
plt.show()

# %% [markdown]
# ## What would change our mind
#
# * A filter that leaves its line: the forms of one and of two keys are algebra and hold to
#   rounding, those of crowds are means over random keys, within sampling error here.
# * Keys that are not spread evenly. Trained keys crowd where the data is, and the width that
#   counts is smaller than their length.
# * A task in which the *latest* value is wanted: then forgetting is the point, and the delta
#   rule's exponential is what one asks for. `mbd collide` shows both sides for the whole
#   catalogue.
#
# *Change a number and run again: `NOISE`, the key width, decay and drift.*
