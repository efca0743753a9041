"""The words of RULER's needle tasks: the needle, the noise around it, and the question.

Source: RULER (Hsieh et al., 2024, arXiv 2404.06654), github.com/NVIDIA/RULER, `niah`.
"""

from collections.abc import Sequence

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {query} mentioned in the provided text?"
    " The special magic {kind} for {query} mentioned in the provided text is"
)
_SEVERAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?"
    " The special magic {kind} for {query} mentioned in the provided text are"
)


def prompt(kinds: str, context: str, keys: Sequence[str], answers: int) -> str:
    """A text, and the question for the values of some keys.

    Args:
        kinds: what values are, as "numbers".
        context: the text.
        keys: that are asked for.
        answers: how many values they have together.
    """
    query = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    text, kind = (_ONE, kinds[:-1]) if answers == 1 else (_SEVERAL, kinds)
    return text.format(kind=kind, context=context, query=query)
