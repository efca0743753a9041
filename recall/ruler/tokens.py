"""A checkpoint's own tokens: how long a text is, what the model reads, what its answer says."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from design_models import ModelError


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, and the tokens that end what is said.

    Args:
        tokenizer: of tokenizer.json.
        end: after which nothing is said.
        size: tokens that the model has.
    """

    tokenizer: Tokenizer
    end: tuple[int, ...]
    size: int

    def count(self, text: str) -> int:
        """Tokens of a text, without any that are put around it."""
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def read(self, text: str) -> Int[np.ndarray, " token"]:
        """What the model reads: the text behind a token that begins texts, where there is one.

        Raises:
            ModelError: the model does not have such a token.
        """
        numbers = self.tokenizer.encode(text).ids
        while numbers and numbers[-1] in self.end:
            numbers = numbers[:-1]
        if numbers and max(numbers) >= self.size:
            raise ModelError(
                f"tokenizer.json gives token {max(numbers)}, but the model has {self.size}; put "
                "the tokenizer that it was trained with into its folder."
            )
        return np.asarray(numbers, np.int32)

    def words(self, said: Int[np.ndarray, " token"]) -> str:
        """The text of what is said."""
        return self.tokenizer.decode(said.tolist(), skip_special_tokens=True)


def vocabulary_of(beside: Mapping[str, bytes], size: int) -> Vocabulary:
    """The vocabulary of a checkpoint.

    Args:
        beside: its files that are not weights, by name.
        size: tokens that the model has.

    Raises:
        ModelError: there is no tokenizer.json, or it cannot be read.
    """
    if "tokenizer.json" not in beside:
        raise ModelError(
            "`FOLDER` holds no tokenizer.json; put the one that the model was trained with there."
        )
    try:
        tokenizer = Tokenizer.from_str(beside["tokenizer.json"].decode())
    except Exception as error:  # of the library, which has no type of its own
        raise ModelError(f"tokenizer.json cannot be read: {error}.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for name in ("generation_config.json", "config.json"):
        end = _settings(beside, name).get("eos_token_id")
        if end is not None:
            ends = tuple(end) if isinstance(end, Sequence) else (end,)
            return Vocabulary(tokenizer, ends, size)
    return Vocabulary(tokenizer, (), size)


def _settings(beside: Mapping[str, bytes], name: str) -> Mapping[str, Any]:
    try:
        settings = json.loads(beside.get(name, b"{}"))
    except ValueError as error:
        raise ModelError(f"{name} is no JSON: {error}.") from error
    return settings if isinstance(settings, Mapping) else {}
