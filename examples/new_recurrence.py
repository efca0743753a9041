"""A recurrence of one's own, from its design model to a language model that trains.

Every key decays at its own rate, and a value is trusted less where the memory has just drifted.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax

from design_models import DesignModel
from inference import verify
from layers import LanguageModel, compile_layer

PAIRS, BATCH, STEPS = 8, 16, 100


def memory(value_width, key_width):
    def prior():
        shape = (value_width, key_width)
        return numpyro.sample("memory", dist.Normal(jnp.zeros(shape), 1.0).to_event(2))

    def transition(memory, u):
        fading, scale = memory * u["decay"], jnp.sqrt(u["drift"])
        return numpyro.sample("memory", dist.Normal(fading, scale).to_event(2))

    def observe(memory, u):
        noise = u["noise"] * (1 + jnp.sum(u["drift"]))
        law = dist.Normal(memory @ u["key"], jnp.sqrt(noise))
        numpyro.sample("value", law.to_event(1), obs=u["value"])

    def inputs(rng, steps):
        rngs = jax.random.split(rng, 5)
        return {
            "key": jax.random.normal(rngs[0], (steps, key_width)),
            "value": jax.random.normal(rngs[1], (steps, value_width)),
            "decay": jax.random.uniform(rngs[2], (steps, key_width), minval=0.7),
            "drift": jax.random.uniform(rngs[3], (steps, key_width), minval=0.1),
            "noise": jax.random.uniform(rngs[4], (steps,), minval=0.1),
        }

    return DesignModel(prior, transition, observe, inputs=inputs)


def draw_recall(rng):
    """Pairs of tokens k v k v ..., then the keys in another order, whose values are asked for."""
    rng_keys, rng_values, rng_order = jax.random.split(rng, 3)
    numbers = jnp.tile(jnp.arange(PAIRS), (BATCH, 1))
    keys = jax.random.permutation(rng_keys, numbers, axis=1, independent=True)
    values = PAIRS + jax.random.randint(rng_values, (BATCH, PAIRS), 0, PAIRS)
    order = jax.random.permutation(rng_order, numbers, axis=1, independent=True)
    pairs = jnp.stack([keys, values], axis=2).reshape(BATCH, 2 * PAIRS)
    asked, answers = (jnp.take_along_axis(part, order, axis=1) for part in (keys, values))
    return jnp.concatenate([pairs, asked], axis=1), answers


def recall_loss(model, tokens, answers):
    logits = jax.vmap(lambda tokens: model(tokens)[0])(tokens)[:, -PAIRS:]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, answers).mean()


def main():
    certificate = verify(memory(3, 2), name="doubtful drift")

    def make_mixer(rng):
        return compile_layer(certificate, 64, heads=2, model=memory(16, 16), rng=rng)

    model = LanguageModel(2 * PAIRS, 64, 1, make_mixer, hidden=64, rng=jax.random.key(0))
    optimiser = optax.adam(1e-2, b2=0.95)
    state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def train(model, state, rng):
        loss, slopes = eqx.filter_value_and_grad(recall_loss)(model, *draw_recall(rng))
        updates, state = optimiser.update(slopes, state)
        return eqx.apply_updates(model, updates), state, loss

    losses = []
    for rng in jax.random.split(jax.random.key(1), STEPS):
        model, state, loss = train(model, state, rng)
        losses.append(float(loss))
    print(f"{model}\nloss before {losses[0]:.3f}, after {STEPS} steps {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
