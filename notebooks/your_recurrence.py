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
# # A recurrence of your own
#
# You have an idea about what a memory should do. Can it become a layer that trains, without
# deriving an update by hand and hoping?
#
# **The assumption, in words.** *Some of what I am told lasts, some is only true for a moment, and
# nobody says which.* So the memory is a sum of two parts: a lasting one that hardly drifts, and a
# fleeting one that fades. In one equation, of a key $k$ and a value $v$:
#
# $$ v_t = (L_t + F_t)\,k_t + e_t, \qquad L_t \approx L_{t-1}, \qquad
#    F_t = a F_{t-1} + N(0, \tfrac12 (1 - a^2)), \qquad L_0, F_0 \sim N(0, \tfrac12). $$
#
# **In ten lines of NumPy**, for one key: the textbook's Kalman filter of two numbers that are
# seen as their sum.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax

from design_models import DesignModel
from inference import NotLinearGaussian, derive, verify
from layers import LanguageModel, compile_layer

plt.style.use("talk.mplstyle")
NOISE, FADING, LASTING_DRIFT = 0.1, 0.7, 1e-3


def two_parts(told, values):
    mean, covariance, answers = np.zeros(2), np.eye(2) / 2, []
    kept, drift = np.array([1, FADING]), np.array([LASTING_DRIFT, (1 - FADING**2) / 2])
    for key, value in zip(told, values, strict=True):
        mean = kept * mean
        covariance = np.outer(kept, kept) * covariance + np.diag(drift)
        seen = key * np.ones(2)  # what is seen is the sum, or nothing where the key is 0
        gain = covariance @ seen / (seen @ covariance @ seen + NOISE)
        mean = mean + gain * (value - seen @ mean)
        covariance = covariance - np.outer(gain, seen @ covariance)
        answers.append(np.sum(mean))
    return np.array(answers)


# %% [markdown]
# ## A prediction, before anything is derived
#
# Tell the memory one value ten times, then another twice, then nothing. At first it should
# answer with the new value, for it was told last. But what was said ten times is put down as
# lasting, the exception as fleeting; so, *without being told anything more*, the memory should go
# back to the usual value. Psychologists call this spontaneous recovery. No memory with one rate
# of forgetting can do it: there old and new fade alike.

# %%
USUAL, EXCEPTION, SILENCE = 10, 2, 16
told = np.r_[np.ones(USUAL + EXCEPTION), np.zeros(SILENCE)]
first = np.r_[np.ones(USUAL), np.zeros(EXCEPTION + SILENCE)]
second = np.r_[np.zeros(USUAL), np.ones(EXCEPTION), np.zeros(SILENCE)]
usual, exception = two_parts(told, first), two_parts(told, second)
moments = {"told": USUAL, "after the exception": USUAL + EXCEPTION, "after silence": len(told)}
for moment, place in moments.items():
    print(f"{moment:20s} usual {usual[place - 1]:.2f}, exception {exception[place - 1]:.2f}")
assert usual[USUAL + EXCEPTION - 1] < exception[USUAL + EXCEPTION - 1]
assert usual[-1] > 2 * exception[-1]


# %% [markdown]
# ## The design model
#
# Both parts are one memory of `(value, 2 key)` numbers, which reads every key twice. Whatever a
# token decides is an input `u`; how fast the fleeting part fades may be learned, token by token.


# %%
def memory(value_width, key_width):
    def prior():
        mean = jnp.zeros((value_width, 2 * key_width))
        return numpyro.sample("memory", dist.Normal(mean, jnp.sqrt(0.5)).to_event(2))

    def transition(memory, u):
        fading = jnp.full(key_width, u["decay"])
        kept = memory * jnp.concatenate([jnp.ones(key_width), fading])
        drift = jnp.concatenate([jnp.full(key_width, LASTING_DRIFT), (1 - fading**2) / 2])
        return numpyro.sample("memory", dist.Normal(kept, jnp.sqrt(drift)).to_event(2))

    def observe(memory, u):
        law = dist.Normal(memory @ jnp.tile(u["key"], 2), jnp.sqrt(u["noise"]))
        numpyro.sample("value", law.to_event(1), obs=u["value"])

    def readout(memory, u):
        return memory @ jnp.tile(u["query"], 2)

    def inputs(rng, steps):  # examples that verification draws
        rngs = jax.random.split(rng, 5)
        return {
            "key": jax.random.normal(rngs[0], (steps, key_width)),
            "query": jax.random.normal(rngs[1], (steps, key_width)),
            "value": jax.random.normal(rngs[2], (steps, value_width)),
            "decay": jax.random.uniform(rngs[3], (steps,), minval=0.3, maxval=0.9),
            "noise": jax.random.uniform(rngs[4], (steps,), minval=0.1, maxval=0.5),
        }

    return DesignModel(prior, transition, observe, readout, inputs=inputs)


# %% [markdown]
# ## The certificate
#
# `verify` proves that the model is linear-Gaussian, derives its filter, and has it judged by
# three oracles that share no code with the derivation. Two numbers of memory are enough: what is
# proved does not depend on the width.

# %%
certificate = verify(memory(1, 1), name="lasting and fleeting")
print(*certificate.update, sep="\n")
assert certificate.holds

figure, axis = plt.subplots(figsize=(8, 4.6))
oracles = list(dict.fromkeys(check.oracle for check in certificate.checks))
checks = [check for check in certificate.checks if check.threshold > 0]
for place, check in enumerate(reversed(checks)):
    ratio = max(check.statistic / check.threshold, 1e-9)
    axis.plot(ratio, place, "o", color=f"C{oracles.index(check.oracle)}")
names = [f"{check.oracle}: {check.quantity}" for check in reversed(checks)]
axis.set_yticks(range(len(checks)), names, fontsize=8)
axis.axvline(1, color="0.3", linewidth=1)
axis.set(xscale="log", xlim=(1e-9, 20), ylabel="oracle: quantity")
axis.set(xlabel="statistic over its threshold (refused right of 1)")
axis.set_title(f"All {len(certificate.checks)} checks of the derived filter hold")
plt.show()

# %% [markdown]
# **The prediction, against the derived filter.** What follows ran through the model above, not
# through the ten lines; they must agree.

# %%
time = len(told)
with jax.enable_x64(True):
    u = {
        "key": jnp.asarray(told)[:, None],
        "query": jnp.ones((time, 1)),
        "decay": jnp.full(time, FADING),
        "noise": jnp.full(time, NOISE),
    }
    derived = [
        np.asarray(certificate.exact_filter.run(u | {"value": jnp.asarray(part)[:, None]}).outputs)
        for part in (first, second)
    ]
gap = max(np.max(np.abs(derived[0][:, 0] - usual)), np.max(np.abs(derived[1][:, 0] - exception)))
print(f"largest difference between the derived filter and the prediction: {gap:.1e}")
assert gap < 1e-12

steps = np.arange(1, time + 1)
figure, axis = plt.subplots()
axis.axvspan(USUAL + 0.5, USUAL + EXCEPTION + 0.5, color="0.93")
axis.plot(steps, usual, color="C0", label="usual value, predicted")
axis.plot(steps, derived[0], "o", color="C0", label="usual value, derived filter")
axis.plot(steps, exception, color="C1", label="exception, predicted")
axis.plot(steps, derived[1], "s", color="C1", label="exception, derived filter")
for left, word in (
    (1, "told the usual value"),
    (USUAL + 0.6, "exception"),
    (USUAL + EXCEPTION + 3, "silence"),
):
    axis.text(left, 1.02, word, color="0.4")
axis.set(xlabel="token", ylabel="weight in the answer", ylim=(-0.05, 1.1))
axis.set_title("The usual value comes back without being told again")
axis.legend(loc="center right", bbox_to_anchor=(1, 0.78))
plt.show()


# %% [markdown]
# **What is refused.** Suppose that values were squashed on their way out. No Kalman filter is
# exact then, and none is returned:


# %%
def squashed(memory, u):
    law = dist.Normal(jnp.tanh(memory @ u["key"]), jnp.sqrt(u["noise"]))
    numpyro.sample("value", law.to_event(1), obs=u["value"])


def unmoved(memory, u):
    return memory


plain = memory(1, 1)
try:
    derive(DesignModel(plain.prior, unmoved, squashed))
except NotLinearGaussian as error:
    refusal = str(error)
print(refusal.split(" (")[0])
assert "observe" in refusal

# %% [markdown]
# ## A layer that trains
#
# The certificate compiles into an Equinox layer of any width. Its task is the one it was made
# for: every key's usual value is told three times, an exception once, a few idle tokens pass, and
# the keys are asked for. The usual values are right. Guessing among the values told for a key
# gives 1/2, among all 1/4.

# %%
KEYS, VALUES, IDLE, BATCH, STEPS = 3, 4, 4, 32, 85


def rows(rng):
    rng_usual, rng_other, rng_order = jax.random.split(rng, 3)
    usual = jax.random.randint(rng_usual, (BATCH, KEYS), 0, VALUES)
    other = (usual + jax.random.randint(rng_other, (BATCH, KEYS), 1, VALUES)) % VALUES
    numbers = jnp.tile(jnp.arange(KEYS), (BATCH, 5, 1))
    numbers = jax.random.permutation(rng_order, numbers, axis=2, independent=True)
    shown = [usual, usual, usual, other]
    values = [jnp.take_along_axis(part, numbers[:, i], axis=1) for i, part in enumerate(shown)]
    pairs = jnp.stack([numbers[:, :4], KEYS + jnp.stack(values, axis=1)], axis=-1)
    idle = jnp.full((BATCH, IDLE), KEYS + VALUES)
    tokens = jnp.concatenate([pairs.reshape(BATCH, -1), idle, numbers[:, 4]], axis=1)
    return tokens, jnp.take_along_axis(usual, numbers[:, 4], axis=1)


def loss_and_accuracy(model, tokens, answers):
    logits = jax.vmap(lambda row: model(row)[0])(tokens)[:, -KEYS:]
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, KEYS + answers)
    return losses.mean(), jnp.mean(jnp.argmax(logits, axis=-1) == KEYS + answers)


def mixer(rng):
    return compile_layer(certificate, 32, heads=1, model=memory(8, 8), rng=rng)


model = LanguageModel(KEYS + VALUES + 1, 32, 1, mixer, hidden=32, rng=jax.random.key(0))
print(model)
optimiser = optax.adam(2e-2, b2=0.95)
state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))


@eqx.filter_jit
def train(model, state, rng):
    found = eqx.filter_value_and_grad(loss_and_accuracy, has_aux=True)(model, *rows(rng))
    updates, state = optimiser.update(found[1], state)
    return eqx.apply_updates(model, updates), state, jnp.stack(found[0])


history = []
for rng in jax.random.split(jax.random.key(1), STEPS):
    model, state, told_now = train(model, state, rng)
    history.append(np.asarray(told_now))  # every batch is new: accuracy is that on unseen rows
accuracy = np.array(history)[:, 1]
smooth = np.convolve(accuracy, np.full(10, 0.1), "valid")

figure, axis = plt.subplots()
axis.plot(np.arange(1, STEPS + 1), 100 * accuracy, ".", color="C0", alpha=0.35, label="a batch")
axis.plot(np.arange(10, STEPS + 1), 100 * smooth, color="C0", label="mean of ten")
axis.axhline(50, color="0.6", linestyle="--", linewidth=1)
axis.text(STEPS, 51, "one of the two values told", color="0.4", ha="right")
axis.axhline(25, color="0.6", linestyle=":", linewidth=1)
axis.text(STEPS, 26, "chance", color="0.4", ha="right")
axis.set(xlabel="training step", ylabel="usual values recalled (%)", ylim=(0, 102))
axis.set_title("The compiled layer learns what its assumption is good for")
axis.legend(loc="upper left")
plt.show()
print(f"usual values recalled: {smooth[0]:.0%} at first, {smooth[-1]:.0%} in the last ten batches")
assert smooth[-1] > 0.9

# %% [markdown]
# ## What would change our mind
#
# * A check right of 1 above: then the derived filter is not that of the model.
# * A task whose exceptions are what is wanted, or that never tells a thing twice: then this
#   assumption is the wrong one, and a model of another makes the better layer.
# * One seed and a small task show *that* it trains. Whether it beats another layer is a matter
#   for `mbd train TASK --layer my_memory.py:model`, beside the others and over seeds.
#
# *Now change a line of `memory`, in words first, and run again.*
