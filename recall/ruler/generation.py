"""Greedy generation, many texts at once, from the recurrent state.

Texts are read in full passes that hand on their state, block by block, so that one program serves
all blocks that are alike; then one program says the answers, a token of every text at a time.
"""

from collections.abc import Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from design_models import ModelError
from layers import Block, LanguageModel

Dtype = Literal["float32", "bfloat16"]
Tokens = Int[np.ndarray, "_"]

_NUMBERS_AT_ONCE = {"gpu": 2**27, "tpu": 2**27}
_FEW_NUMBERS_AT_ONCE, _MOST_ROWS = 2**22, 128
"""Bounds rows × tokens × d_model, and rows, whose states are large where texts are short."""


class Generator:
    """Goes on with texts as a model would.

    Args:
        model: with weights in float32.
        end: tokens after which nothing is said.
        most: tokens that an answer may have.
        rows: texts at once; as many as fit where left out.
        dtype: of activations; states and decays are float32 in both.
    """

    def __init__(
        self,
        model: LanguageModel,
        end: Sequence[int],
        most: int,
        *,
        rows: int | None = None,
        dtype: Dtype = "float32",
    ) -> None:
        head = None if model.head is None else model.head.astype(dtype)
        self._model = eqx.tree_at(
            lambda model: (model.embedding, model.head),
            model,
            (model.embedding.astype(dtype), head),
            is_leaf=lambda node: node is None,
        )
        self._end = jnp.asarray([*end, -1], jnp.int32)
        self._most, self._rows = most, rows

    def rows(self, length: int) -> int:
        """Texts of a length that are read at once."""
        if self._rows is not None:
            return self._rows
        numbers = _NUMBERS_AT_ONCE.get(jax.default_backend(), _FEW_NUMBERS_AT_ONCE)
        return max(1, min(_MOST_ROWS, numbers // (length * self._model.embedding.shape[1])))

    def __call__(self, texts: Sequence[Tokens], length: int, count: int) -> list[Tokens]:
        """What the model says after each text, greedily.

        Args:
            texts: at most as many as `rows(length)`, each at most `length` long.
            length: that all are read as, so that all cells of a length share a program.
            count: tokens to say.

        Returns:
            For every text at most `count` tokens, those from the first end on left out.
        """
        rows = self.rows(length)
        tokens = np.zeros((rows, length), np.int32)
        mask = np.zeros((rows, length), bool)
        for row, text in enumerate(texts):
            tokens[row, length - len(text) :] = text
            mask[row, length - len(text) :] = True
        try:
            said = self._said(tokens, mask, count)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise ModelError(
                f"`--rows` is {rows}: the device has no memory for so many texts of {length} "
                "tokens at once; give fewer."
            ) from error
        return [_before_end(row[:count], self._end) for row in said[: len(texts)]]

    def _said(
        self, tokens: Int[np.ndarray, "row time"], mask: Bool[np.ndarray, "row time"], count: int
    ) -> Int[np.ndarray, "row said"]:
        with jax.default_matmul_precision("highest" if self._in_full else "default"):
            logits, states = _read(self._model, jnp.asarray(tokens), jnp.asarray(mask))
            idle, limit = jnp.asarray(~mask.any(axis=1)), jnp.asarray(count)
            return np.asarray(_say(self._model, logits, states, idle, self._end, limit, self._most))

    @property
    def _in_full(self) -> bool:
        return self._model.embedding.dtype == jnp.float32


def _before_end(said: Tokens, end: Array) -> Tokens:
    ends = np.flatnonzero(np.isin(said, np.asarray(end)))
    return said[: ends[0]] if len(ends) else said


def _read(
    model: LanguageModel, tokens: Int[Array, "row time"], mask: Bool[Array, "row time"]
) -> tuple[Float[Array, "row token"], tuple[Any, ...]]:
    """Logits after the last token, and the states there."""
    x, states = model.embedding[tokens], []
    for block in model.blocks:
        x, state = _through(block, x, mask)
        states.append(state)
    return _scores(model, x[:, -1]), tuple(states)


@eqx.filter_jit
def _through(block: Block, x: Array, mask: Array) -> tuple[Array, Any]:
    def one(x: Array, mask: Array) -> tuple[Array, Any]:
        x, _, state = block(x, mask=mask)
        return x, state

    return jax.vmap(one)(x, mask)


@eqx.filter_jit
def _scores(model: LanguageModel, x: Array) -> Array:
    return model.logits(model.norm(x))


@eqx.filter_jit
def _say(
    model: LanguageModel,
    logits: Float[Array, "row token"],
    states: tuple[Any, ...],
    idle: Bool[Array, " row"],
    end: Int[Array, " end"],
    count: Int[Array, ""],
    most: int,
) -> Int[Array, "row said"]:
    """The likeliest token again and again, until all texts have ended or `count` are said."""
    rows = logits.shape[0]

    def chosen(logits: Array) -> Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def goes_on(carry: tuple) -> Array:
        place, _, _, ended, _ = carry
        return (place < count) & ~jnp.all(ended)

    def say(carry: tuple) -> tuple:
        place, token, states, ended, said = carry
        said = jax.lax.dynamic_update_index_in_dim(said, token, place, 1)
        ended = ended | jnp.isin(token, end)
        logits, states = jax.vmap(model.step)(token, states)
        return place + 1, chosen(logits), states, ended, said

    said = jnp.full((rows, most), -1, jnp.int32)
    first = (jnp.asarray(0), chosen(logits), states, idle, said)
    return jax.lax.while_loop(goes_on, say, first)[-1]
