"""Text with a needle in it: values hidden in a haystack, and asked for at the end.

In the words of RULER's needle tasks (Hsieh et al., 2024, arXiv 2404.06654), to train and to measure
on: keys and values are drawn here, so that no document is one of the benchmark's.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .wording import NEEDLE, NOISE, prompt

Kind = Literal["numbers", "uuids", "words"]


@dataclass(frozen=True)
class Form:
    """What is hidden where.

    Args:
        haystack: "noise", "needles" (all lines hide something) or "prose".
        keys: what keys are.
        values: what values are.
        hidden: keys with values, in noise and prose.
        each: values of a key.
        asked: keys that are asked for.
    """

    haystack: Literal["noise", "needles", "prose"]
    keys: Kind = "words"
    values: Kind = "numbers"
    hidden: int = 1
    each: int = 1
    asked: int = 1


FORMS = {
    "single, noise": Form("noise"),
    "single, prose": Form("prose"),
    "single, prose, uuids": Form("prose", values="uuids"),
    "single, noise, words": Form("noise", values="words"),
    "multikey, prose": Form("prose", hidden=4),
    "multikey, needles": Form("needles"),
    "multikey, needles, uuids": Form("needles", "uuids", "uuids"),
    "multivalue, prose": Form("prose", each=4),
    "multiquery, prose": Form("prose", hidden=4, asked=4),
}
"""By name; as RULER's single_1, single_2, single_3, one of ours, multikey_1 to 3, and so on."""


@dataclass(frozen=True)
class NeedleText:
    """What is read, and what is right to say after it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Sources:
    """What needle texts are made of.

    Args:
        words: for keys, and for values that are words.
        prose: documents for haystacks.
    """

    words: Sequence[str]
    prose: Sequence[str]


def sources_of(documents: Sequence[str]) -> Sources:
    """Words of 4 to 9 small letters of the documents, those that come often, and the documents."""
    counts: dict[str, int] = {}
    for document in documents:
        for word in document[:200_000].split():
            if 4 <= len(word) <= 9 and word.isascii() and word.isalpha() and word.islower():
                counts[word] = counts.get(word, 0) + 1
    often = sorted(counts, key=lambda word: (-counts[word], word))[:4000]
    return Sources(sorted(often) or ["grass", "stone"], documents)


def needle_text(
    form: Form, sources: Sources, characters: int, rng: np.random.Generator
) -> NeedleText:
    """One text of about so many characters.

    Args:
        form: what is hidden where.
        sources: words and prose.
        characters: of the prompt, which is longer where its needles alone are.
        rng: of all draws.
    """
    hidden = max(form.hidden, form.asked)
    if form.haystack == "needles":
        line = 12 + len(NEEDLE) + (36 if form.keys == "uuids" else 0)
        line += 25 if form.values == "uuids" else 0
        hidden = max(2, (characters - 300) // line)
    keys = list(dict.fromkeys(_drawn(form.keys, sources, rng) for _ in range(2 * hidden)))[:hidden]
    values = [[_drawn(form.values, sources, rng) for _ in range(form.each)] for _ in keys]
    needles = [
        NEEDLE.format(kind=form.values, key=key, value=value)
        for key, own in zip(keys, values, strict=True)
        for value in own
    ]
    chosen = [int(place) for place in rng.permutation(len(keys))[: form.asked]]
    context = _context(form, needles, sources, characters, rng)
    said = [value for place in chosen for value in values[place]]
    asked = [keys[place] for place in chosen]
    return NeedleText(prompt(form.values, context, asked, len(said)), f" {', '.join(said)}.")


def _context(
    form: Form, needles: list[str], sources: Sources, characters: int, rng: np.random.Generator
) -> str:
    room = max(0, characters - 350 - sum(map(len, needles)))
    if form.haystack == "needles":
        return "\n".join(needles[int(place)] for place in rng.permutation(len(needles)))
    if form.haystack == "noise":
        lines, joint = [NOISE] * max(len(needles), room // (len(NOISE) + 1)), "\n"
    else:
        lines, joint = _sentences(sources.prose, room, rng), " "
    places = np.sort(rng.integers(0, len(lines) + 1, len(needles)))[::-1]
    for needle, place in zip(needles, places, strict=True):
        lines.insert(int(place), needle)
    return joint.join(lines)


def _sentences(prose: Sequence[str], room: int, rng: np.random.Generator) -> list[str]:
    """Sentences that follow each other somewhere in the prose."""
    document = prose[int(rng.integers(len(prose)))]
    start = int(rng.integers(max(1, len(document) - room)))
    words = " ".join(document[start : start + room].split())
    sentences = words.replace("? ", "?\0").replace("! ", "!\0").replace(". ", ".\0").split("\0")
    return sentences[1:] if len(sentences) > 1 else sentences


def _drawn(kind: Kind, sources: Sources, rng: np.random.Generator) -> str:
    match kind:
        case "numbers":
            return str(rng.integers(10**6, 10**7))
        case "uuids":
            return str(uuid.UUID(bytes=rng.bytes(16), version=4))
        case "words":
            first, second = rng.integers(len(sources.words), size=2)
            return f"{sources.words[int(first)]}-{sources.words[int(second)]}"
