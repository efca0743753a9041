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
# # Is this memory calibrated?
#
# A memory that filters exactly says, with every answer, how far to trust it. Is that number
# honest? And what does it cost when it is not?
#
# **The model.** A memory $S$ maps keys to values. It starts as $S \sim N(0, 1)$, entry by entry,
# and every token is a noisy reading of it:
#
# $$ v_t = S k_t + e_t, \qquad e_t \sim N(0, r). $$
#
# **The memory, in ten lines of NumPy.** Four memories differ only in what is done to the
# covariance $P$ before a write, and in the noise that they assume. Beside $P$, which is what a
# memory *believes* about its errors, we carry the covariance `E` that its errors truly *have*:
# whatever gain $g$ a memory uses, its error goes $e \mapsto (I - g k^\top) e + g\,\varepsilon$.

# %%
import arviz as az
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import ml_dtypes
import numpy as np

from design_models import associative_regression
from inference import derive
from inference.calibration import (
    calibration,
    coverage,
    nats_lost,
    pit,
    pit_distribution,
    uniformity,
)
from inference.equations import equations
from layers import Stream, filter_scan

jax.config.update("jax_enable_x64", True)
plt.style.use("talk.mplstyle")
rng = np.random.default_rng(0)
KEY, WRITES, MEMORIES, QUERIES = 16, 48, 2000, 32
IDENTITY = np.eye(KEY)


def remember(keys, values, noise, true_noise, before=lambda P: P):
    M, P, E = np.zeros((values.shape[1], KEY)), IDENTITY, IDENTITY
    for k, v in zip(keys, values, strict=True):
        P = before(P)
        s = k @ P @ k + noise
        g = P @ k / s
        M, P = M + np.outer(v - M @ k, g), P - s * np.outer(g, g)
        E = (IDENTITY - np.outer(g, k)) @ E @ (IDENTITY - np.outer(k, g)) + true_noise * np.outer(
            g, g
        )
    return M, P, E


def directions(count):
    drawn = rng.normal(size=(count, KEY))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def rounded(P):
    return P.astype(ml_dtypes.bfloat16).astype(float)


KINDS = {  # name: the noise that is assumed, over the true one; what is done before a write
    "exact filter": (1, lambda P: P),
    "covariance reset": (1, lambda P: IDENTITY),
    "noise taken as a quarter": (1 / 4, lambda P: P),
    "bfloat16 covariance": (1, rounded),
}
COLOURS = dict(zip(KINDS, ("C0", "C1", "C2", "C3"), strict=True))

# %% [markdown]
# The rows of $S$ share their keys, and so their covariance: one run with 2,000 rows is 2,000
# memories. Each is asked for its value along 32 random directions that it was never shown.

# %%
keys, queries = directions(WRITES), directions(QUERIES)
truth = rng.normal(size=(MEMORIES, KEY))
errors = rng.normal(size=(WRITES, MEMORIES))


def variances(covariance):
    return np.einsum("qk,kl,ql->q", queries, covariance, queries)


def ask(kind, noise):
    """What memories say at the queries: mean, stated variance, variance that errors have."""
    share, before = KINDS[kind]
    values = keys @ truth.T + np.sqrt(noise) * errors
    M, P, E = remember(keys, values, share * noise, noise, before)
    return M @ queries.T, variances(P), variances(E)


wanted = truth @ queries.T

# %% [markdown]
# ## The derived update
#
# The library derives the exact filter from the model, and calls the second memory what it is: the
# same filter with its covariance reset before every write, which is the delta rule.

# %%
small = derive(associative_regression(value_width=1, key_width=2))
print(*equations(small), sep="\n")

# %% [markdown]
# **An oracle.** The compiled layer's scan shares no code with the ten lines above.

# %%
said = ask("exact filter", 0.1)
values = keys @ truth.T + np.sqrt(0.1) * errors
stream = Stream(jnp.asarray(keys), jnp.asarray(values), jnp.asarray(keys), jnp.full(WRITES, 0.1))
belief, _ = filter_scan(stream, algorithm="token")
gap = np.max(np.abs(said[0] - np.asarray(belief.mean) @ queries.T))
print(f"largest difference between the two filters' means: {gap:.1e}")
assert gap < 1e-10

# %% [markdown]
# ## Predictions, before any answer is compared
#
# A transform $u = \Phi((y - m)/s)$ of the truth $y$ is uniform for an honest memory. If errors
# have variance $\sigma^2$ where $s^2$ is stated, it is not: $P(u \le p) =
# \Phi(\Phi^{-1}(p)\,s/\sigma)$. Both variances are known without a single draw, so all that
# follows is predicted:
#
# * the **exact** filter: $s = \sigma$, so every interval holds what it says;
# * the **reset**: at most one direction was just written, all others are called unknown. It will
#   be far *too unsure*, and the more it has seen, the more so;
# * **noise taken as a quarter**: $\sigma^2/s^2 \to 4$, so that 90 % intervals hold
#   $2\Phi(1.645/2) - 1 = 59\,\%$ of the truths;
# * **bfloat16**: it keeps 8 bits, so a variance below $2^{-8} \approx 0.004$ of the prior's
#   drowns in rounding. Harmless at $r = 0.1$, ruinous at $r = 0.001$.

# %%
NOISE = {kind: 0.001 if kind == "bfloat16 covariance" else 0.1 for kind in KINDS}
answers = {kind: ask(kind, NOISE[kind]) for kind in KINDS}
possible = {kind: stated > 0 for kind, (_, stated, _) in answers.items()}
for kind, keep in possible.items():
    if not keep.all():
        print(f"{kind}: {np.mean(~keep):.0%} of the stated variances are negative")
transforms = {
    kind: pit(mean[:, possible[kind]], stated[possible[kind]], wanted[:, possible[kind]])
    for kind, (mean, stated, _) in answers.items()
}
predicted = {
    kind: lambda level, stated=stated[possible[kind]], found=found[possible[kind]]: np.mean(
        1 - 2 * pit_distribution((1 - np.asarray(level)[..., None]) / 2, stated, found), axis=-1
    )
    for kind, (_, stated, found) in answers.items()
}

# %%
levels = np.linspace(0.02, 0.98, 25)
figure, axis = plt.subplots(figsize=(8.5, 4.6))
for kind, colour in COLOURS.items():
    axis.plot(100 * levels, 100 * predicted[kind](levels), color=colour)
    measured = [100 * coverage(transforms[kind], level) for level in levels[::3]]
    label = f"{kind} (r = {NOISE[kind]:g})"
    axis.plot(100 * levels[::3], measured, "o", color=colour, label=label)
axis.set(xlabel="stated probability of a central interval (%)", xlim=(0, 100), ylim=(0, 101))
axis.set(ylabel="how often it holds the truth (%)")
axis.set_title("Only the exact filter's intervals hold what they say")
axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), title="lines predicted, dots measured")
plt.show()

for kind in KINDS:
    measured, expected = coverage(transforms[kind], 0.9), predicted[kind](0.9)
    print(f"{kind:25s} 90 % intervals hold {measured:.1%}, predicted {expected:.1%}")
    assert abs(measured - expected) < 0.02
assert abs(coverage(transforms["exact filter"], 0.9) - 0.9) < 0.01
assert coverage(transforms["covariance reset"], 0.9) > 0.99
assert abs(coverage(transforms["noise taken as a quarter"], 0.9) - 0.59) < 0.02

# %% [markdown]
# ## What miscalibration looks like
#
# ArviZ draws how the transforms depart from uniform, and marks where they do so by more than
# chance allows. One question to each of 500 memories keeps them independent. A curve first below
# zero, then above: truths fall into the middle too often, the memory is too unsure. First above,
# then below: it is too sure.

# %%
panels = {}
for kind, mine in transforms.items():
    asked = rng.integers(mine.shape[1], size=500)
    panels[f"{kind} (r = {NOISE[kind]:g})"] = mine[np.arange(500), asked][None]
az.plot_ecdf_pit(
    az.from_dict({"posterior": panels}),
    group="posterior",
    col_wrap=2,
    figure_kwargs={"figsize": (8.5, 6), "sharey": False},
    visuals={
        "xlabel": {"text": "transform u"},
        "ylabel": {"text": "ECDF(u) − u"},
        "p_value_text": False,
    },
)
plt.gcf().suptitle("Too unsure and too sure bend in opposite ways", x=0.02, ha="left")
plt.show()

chances = {kind: uniformity(mine[0]) for kind, mine in panels.items()}
for kind, chance in chances.items():
    print(f"{kind:40s} probability of being no more uniform, if honest: {chance:.2g}")
assert [chance > 0.01 for chance in chances.values()] == [True, False, False, False]

# %% [markdown]
# ## What it costs
#
# The log score of an answer is its log density under what the memory said, in nats: the larger
# the better, and best on average for the truth's own law. Against the exact filter ($\sigma_0^2$)
# a memory loses
#
# $$ \underbrace{\tfrac12 \log \sigma^2/\sigma_0^2}_{\text{larger errors}} +
#    \underbrace{\tfrac12 (\sigma^2/s^2 - 1 - \log \sigma^2/s^2)}_{\text{wrong doubt}}, $$
#
# known in advance too. The second part grows with the *square* of the errors for a memory that is
# too sure, and only with a logarithm for one that is too careful.


# %%
def score(mean, stated):
    return calibration(mean, stated, wanted).log_score


def loss(share, before=lambda P: P, noise=0.1):
    """Nats an answer loses against the exact filter: measured, and predicted in two parts."""
    values = keys @ truth.T + np.sqrt(noise) * errors
    memories = [remember(keys, values, share * noise, noise, before)]
    memories.append(remember(keys, values, noise, noise))
    mine, best = ((M @ queries.T, variances(P), variances(E)) for M, P, E in memories)
    larger = np.mean(0.5 * np.log(mine[2] / best[2]))
    return score(*best[:2]) - score(*mine[:2]), larger, np.mean(nats_lost(*mine[1:]))


shares = 2.0 ** np.arange(-4, 5)
assumed = np.array([loss(share) for share in shares])
reset = loss(1, lambda P: IDENTITY)
figure, axis = plt.subplots()
axis.plot(shares, assumed[:, 1:].sum(axis=1), label="wrong noise, predicted")
axis.plot(shares, assumed[:, 0], "o", color="C0", label="wrong noise, measured")
axis.axhline(reset[0], color="C1", label=f"covariance reset: {reset[0]:.2f} nats")
axis.axhline(reset[1], color="C1", linestyle=":", label="  of which larger errors")
axis.set_xscale("log", base=2, subs=[])
axis.set_xticks(shares, [f"1/{1 / x:.0f}" if x < 1 else f"{x:.0f}" for x in shares])
axis.set(xlabel="noise that the memory assumes, over the true noise (r = 0.1)")
axis.set(ylabel="log score lost (nats an answer)", ylim=(-0.1, None))
axis.set_title("Being too sure costs far more than being too careful")
axis.legend()
plt.show()

np.testing.assert_allclose(assumed[:, 0], assumed[:, 1:].sum(axis=1), rtol=0.1, atol=0.01)
assert assumed[0, 0] > 4 * assumed[-1, 0]
assert abs(reset[0] - reset[1] - reset[2]) < 0.05
print(
    f"assuming 1/16 of the noise loses {assumed[0, 0]:.2f} nats, 16 times it {assumed[-1, 0]:.2f}"
)
print(f"the reset loses {reset[1]:.2f} by larger errors and {reset[2]:.2f} by wrong doubt")

# %% [markdown]
# ## Where bfloat16 stops being harmless
#
# The library's layers keep the covariance in float32, always. Was that necessary? The prediction:
# a bfloat16 covariance breaks once the noise falls below about $2^{-8}$ of the prior variance. An
# answer with a negative variance counts as a miss.

# %%
noises = 2.0 ** -np.arange(2.0, 13.0)


def covered(mean, stated):
    keep = stated > 0
    return np.mean(keep) * coverage(pit(mean[:, keep], stated[keep], wanted[:, keep]))


@jax.jit
@jax.vmap
def layer(noise):
    values = keys @ truth.T + jnp.sqrt(noise) * errors
    parts = (keys, values, keys, jnp.full(WRITES, noise))
    belief, _ = filter_scan(Stream(*(jnp.asarray(part, jnp.float32) for part in parts)))
    return belief.mean, belief.covariance


halved = [covered(*ask("bfloat16 covariance", noise)[:2]) for noise in noises]
means, covariances = (np.asarray(part, float) for part in layer(jnp.asarray(noises)))
single = [covered(M @ queries.T, variances(P)) for M, P in zip(means, covariances, strict=True)]
figure, axis = plt.subplots()
axis.axhline(90, color="0.6", linestyle="--", linewidth=1)
axis.axvline(2.0**-8, color="0.6", linestyle=":", linewidth=1)
axis.text(2.0**-8 * 0.92, 8, "rounding of\nbfloat16", color="0.4")
axis.plot(noises, 100 * np.array(single), "o-", label="the library's layer: float32 covariance")
axis.plot(noises, 100 * np.array(halved), "o-", color="C3", label="bfloat16 covariance")
axis.set_xscale("log", base=2)
axis.invert_xaxis()
axis.set(xlabel="noise r, over the prior variance", ylabel="90 % intervals that hold (%)")
axis.set(ylim=(0, 100))
axis.set_title("Below bfloat16's rounding, confidence is noise")
axis.legend(loc="lower left")
plt.show()

assert np.max(np.abs(np.array(single) - 0.9)) < 0.02
assert np.max(np.abs(np.array(halved)[noises > 2.0**-6] - 0.9)) < 0.02
assert np.min(np.array(halved)[noises < 2.0**-8]) < 0.7

# %% [markdown]
# ## What would change our mind
#
# * Intervals of the exact filter that miss their level by more than sampling allows, on data that
#   the model describes: then the derivation, or the compiled layer, is wrong.
# * Data that the model does not describe. All of this holds *if* values are linear in keys with
#   noise $r$; a trained layer chooses its own keys, values and noise. `mbd eval RUN` judges what
#   it says of continuous values with the same functions
#   ([inference/calibration.py](../inference/calibration.py)).
# * A use of the answers in which doubt has no price. Ranked by cost, the mean comes first there,
#   and the reset's mean is the smaller half of its loss above.
#
# *Change a number and run again: `WRITES`, the noise, the number of keys that repeat.*
