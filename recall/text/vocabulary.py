"""Tokens: pairs of bytes merged where they are frequent, every digit on its own."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt16
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from design_models import ModelError

END = "<|end|>"
"""Ends every document; its number is 0."""

LARGEST = 2**15
"""Tokens that 16 bits hold beside a mark."""

_PIECE, _LINE = 10_000, re.compile(r"\n(?=\S)")
_MOST_CHARACTERS = 20_000_000


def train_vocabulary(documents: Sequence[str], size: int) -> Tokenizer:
    """A byte-level vocabulary of text; any text can be written in it.

    Args:
        documents: of which up to 20 million characters are looked at, spread over all.
        size: tokens, `END` and 256 bytes included.

    Raises:
        ModelError: `size` is too small or too large.
    """
    if not 257 <= size <= LARGEST:
        raise ModelError(f"`--vocabulary` is {size}; it must lie between 257 and {LARGEST}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    total = sum(map(len, documents))
    stride = max(1, -(-total // _MOST_CHARACTERS))
    tokenizer.train_from_iterator(_pieces(documents, stride), trainer)
    return tokenizer


def read_vocabulary(path: Path) -> Tokenizer:
    """A tokenizer.json.

    Raises:
        ModelError: it cannot be read, or has more tokens than 16 bits hold beside a mark.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # of the library, which has no type of its own
        raise ModelError(f"{path} is no tokenizer that can be read: {error}.") from error
    if tokenizer.get_vocab_size() > LARGEST:
        raise ModelError(
            f"{path} has {tokenizer.get_vocab_size()} tokens; at most {LARGEST} can be trained on."
        )
    return tokenizer


def end_token(tokenizer: Tokenizer) -> int:
    """The token that ends documents, by one of its usual names.

    Raises:
        ModelError: there is none.
    """
    for name in (END, "</s>", "<|endoftext|>", "<eos>"):
        number = tokenizer.token_to_id(name)
        if number is not None:
            return number
    raise ModelError(f"tokenizer.json has no token that ends documents; add one named {END}.")


def encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> list[UInt16[np.ndarray, " token"]]:
    """Tokens of every text, without any that the tokenizer would add."""
    found = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.asarray(one.ids, np.uint16) for one in found]


def encoded_documents(
    tokenizer: Tokenizer, documents: Sequence[str]
) -> UInt16[np.ndarray, " token"]:
    """All documents in one, each with its end; long ones are cut at line ends to share the work."""
    end = np.asarray([end_token(tokenizer)], np.uint16)
    found = []
    for document in documents:
        found += [*encoded(tokenizer, _in_lines(document)), end]
    return np.concatenate(found)


def _in_lines(document: str) -> list[str]:
    """Pieces that begin with the line end before a word, where no token reaches across."""
    pieces, start = [], 0
    for found in _LINE.finditer(document):
        if found.start() - start >= _PIECE:
            pieces.append(document[start : found.start()])
            start = found.start()
    return [*pieces, document[start:]]


def _pieces(documents: Sequence[str], stride: int) -> Iterator[str]:
    number = 0
    for document in documents:
        for start in range(0, len(document), _PIECE):
            if number % stride == 0:
                yield document[start : start + _PIECE]
            number += 1
