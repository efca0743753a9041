"""A corpus on disk: tokens of prose, rows of needle texts, and the batches that training draws.

Tokens are 16 bits; the highest marks what is right to say after a needle text's question.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt16
from tokenizers import Tokenizer

from design_models import ModelError
from recall.whole_files import written_whole

from .documents import read_documents
from .needles import FORMS, Form, Sources, needle_text, sources_of
from .vocabulary import encoded, encoded_documents, end_token

MARK = 2**15

Rows = UInt16[np.ndarray, "row place"]

_SHORTEST = 96
_TEXTS_AT_ONCE = 2048
_HELD_OUT_SEED = 10**6
_MOST_HELD_OUT = 128


@dataclass(frozen=True)
class Mixture:
    """What training shows.

    Args:
        length: tokens of a row that are read; a row has one more, to be foretold.
        needles: share of rows that hold needle texts.
        rows: how many rows of needle texts are made, to draw from.
        seed: of needle texts.
    """

    length: int = 1024
    needles: float = 0.4
    rows: int = 16384
    seed: int = 0


@dataclass(frozen=True)
class Corpus:
    """Tokens to draw batches from.

    Args:
        mixture: what they were made as.
        end: the token that ends documents.
        prose: all documents, one after the other, each with its end.
        needles: whole needle texts in each row, filled up with prose.
        held_out: prose that is never shown, in rows.
        held_out_needles: needle texts that are never shown, likewise.
    """

    mixture: Mixture
    end: int
    prose: UInt16[np.ndarray, " token"]
    needles: UInt16[np.ndarray, "needle place"]
    held_out: UInt16[np.ndarray, "unseen place"]
    held_out_needles: UInt16[np.ndarray, "unseen_needle place"]

    def batch(self, rows: int, seed: int, step: int) -> Rows:
        """Rows of a step, the same whenever it is asked for."""
        rng = np.random.default_rng([seed, step])
        width = self.mixture.length + 1
        starts = rng.integers(len(self.prose) - width, size=rows)
        shown = self.prose[starts[:, None] + np.arange(width)]
        count = round(rows * self.mixture.needles) if len(self.needles) else 0
        if count:
            shown[:count] = self.needles[rng.integers(len(self.needles), size=count)]
        return shown[rng.permutation(rows)]


def corpus_at(
    cache: Path | str,
    tokenizer: Tokenizer,
    texts: Sequence[Path | str],
    held_out: Sequence[Path | str],
    mixture: Mixture,
    stage: Callable[[str], None] = lambda name: None,
) -> Corpus:
    """The corpus of text files: made once, and read from `cache` later.

    Args:
        cache: a folder; each corpus has one of its own in it.
        tokenizer: of the model.
        texts: files to train on.
        held_out: files that are held out; the last hundredth of the prose where there are none.
        mixture: what training shows.
        stage: told what is being done.

    Raises:
        ModelError: text cannot be read, or is shorter than two rows.
    """
    paths, valid = ([Path(text) for text in files] for files in (texts, held_out))
    named = {
        "tokenizer": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        "texts": [[str(path.resolve()), path.stat().st_size] for path in (*paths, *valid)],
        "valid": len(valid),
        **asdict(mixture),
    }
    name = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]
    file, end = Path(cache) / name / "corpus.npz", end_token(tokenizer)
    if not file.is_file():
        stage("making tokens of the text")
        found = _made(tokenizer, paths, valid, mixture)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(file) as whole:
                np.savez(whole, allow_pickle=False, **found)
        except OSError as error:
            raise ModelError(f"`--cache` is {cache}: {error.strerror}.") from error
    stage("reading tokens")
    with np.load(file) as held:
        return Corpus(mixture, end, **{name: held[name] for name in held.files})


def _made(
    tokenizer: Tokenizer, paths: Sequence[Path], valid: Sequence[Path], mixture: Mixture
) -> dict[str, np.ndarray]:
    documents = read_documents(paths)
    prose, width = encoded_documents(tokenizer, documents), mixture.length + 1
    if valid:
        unseen_documents = read_documents(valid)
        unseen = encoded_documents(tokenizer, unseen_documents)
    else:
        held = max(width, len(prose) // 100)
        prose, unseen, unseen_documents = prose[:-held], prose[-held:], documents
    if len(prose) < 2 * width or len(unseen) < width:
        raise ModelError(
            f"`TEXT` holds {len(prose)} tokens, and {len(unseen)} are held out; rows of "
            f"{mixture.length} need more text, or make them shorter with --length."
        )
    sources = Sources(sources_of(documents).words, documents)
    rng = np.random.default_rng(mixture.seed)
    rows = mixture.rows if mixture.needles > 0 else 0
    other = np.random.default_rng([_HELD_OUT_SEED, mixture.seed])
    unseen_sources = Sources(sources.words, unseen_documents)
    return {
        "prose": prose,
        "needles": _packed(tokenizer, sources, prose, rows, mixture.length, rng),
        "held_out": unseen[: len(unseen) // width * width].reshape(-1, width),
        "held_out_needles": _packed(
            tokenizer,
            unseen_sources,
            unseen,
            min(_MOST_HELD_OUT, rows),
            mixture.length,
            other,
        ),
    }


def _packed(
    tokenizer: Tokenizer,
    sources: Sources,
    prose: UInt16[np.ndarray, " token"],
    rows: int,
    length: int,
    rng: np.random.Generator,
) -> Rows:
    """Rows of whole needle texts of all forms, half of them nearly as long as a row."""
    width, forms, found = length + 1, list(FORMS.values()), []
    row: list[np.ndarray] = []
    while len(found) < rows:
        texts = min(_TEXTS_AT_ONCE, 8 + 4 * (rows - len(found)))
        chosen = [forms[int(place)] for place in rng.integers(len(forms), size=texts)]
        near = rng.random(texts) < 0.5
        lowest = np.where(near, 3 * length // 4, min(_SHORTEST, length // 2))
        aims = rng.integers(lowest, length)
        drawn = needle_tokens(tokenizer, sources, chosen, aims.tolist(), rng)
        fitting = [text for text in drawn if len(text) <= width]
        if len(fitting) < len(drawn) / 4:
            raise ModelError(
                f"`--length` is {length} tokens, too short for most needle texts; make it longer, "
                "or leave them out with --needles 0."
            )
        for text in fitting:
            if sum(map(len, row)) + len(text) > width:
                found.append(_filled(row, prose, width, rng))
                row = []
            row.append(text)
    return np.stack(found[:rows]) if rows else np.zeros((0, width), np.uint16)


def _filled(row: list[np.ndarray], prose: np.ndarray, width: int, rng) -> np.ndarray:
    left = width - sum(map(len, row))
    start = int(rng.integers(len(prose) - left + 1))
    return np.concatenate([*row, prose[start : start + left]])


def needle_tokens(
    tokenizer: Tokenizer,
    sources: Sources,
    forms: Sequence[Form],
    lengths: Sequence[int],
    rng: np.random.Generator,
) -> list[UInt16[np.ndarray, " token"]]:
    """Needle texts, each of about its length in tokens, answers marked, with their ends."""
    ratios = {form: _characters_a_token(tokenizer, sources, form) for form in set(forms)}
    texts = [
        needle_text(form, sources, int(ratios[form] * 0.97 * length), rng)
        for form, length in zip(forms, lengths, strict=True)
    ]
    prompts = encoded(tokenizer, [text.prompt for text in texts])
    answers = encoded(tokenizer, [text.answer for text in texts])
    end = np.asarray([end_token(tokenizer)], np.uint16)
    mark = np.uint16(MARK)
    return [
        np.concatenate([prompt, answer | mark, end])
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _characters_a_token(tokenizer: Tokenizer, sources: Sources, form: Form) -> float:
    text = needle_text(form, sources, 4000, np.random.default_rng(0)).prompt
    return len(text) / len(encoded(tokenizer, [text])[0])


def asked_rows(
    tokenizer: Tokenizer, sources: Sources, form: Form, length: int, rows: int, seed: int
) -> Rows:
    """Rows of one needle text each, as long as `length` allows, to measure retrieval on.

    Texts end where rows end; what is in front of a shorter one is ends of documents.

    Raises:
        ModelError: none of this form is so short.
    """
    rng, width, found = np.random.default_rng([_HELD_OUT_SEED, seed]), length + 1, []
    aim = length
    while len(found) < rows:
        if aim < length // 3:
            raise ModelError(f"`length` is {length} tokens, too short for {form}; ask for more.")
        texts = needle_tokens(tokenizer, sources, [form] * rows, [aim] * rows, rng)
        fitting = [text for text in texts if len(text) <= width]
        found += fitting
        if len(fitting) < len(texts) / 2:
            aim = int(aim * 0.97)
    end = end_token(tokenizer)
    padded = np.full((rows, width), end, np.uint16)
    for row, text in zip(padded, found[:rows], strict=True):
        row[width - len(text) :] = text
    return padded
