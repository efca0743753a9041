"""Questions about one document among many, from a file that the user has.

Source: RULER's `qa_1` (SQuAD) and `qa_2` (HotpotQA); the data are not ours to give. A question
whose own documents alone are too long is passed over, where upstream would try for ever.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from design_models import ModelError

from .samples import Room, Sample, largest

_TEXT = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question "
    "based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "Question: {query} Answer:"
)
_STEP = 10


@dataclass(frozen=True)
class Question:
    """A question and where it is answered.

    Args:
        text: the question.
        answers: any of which is right.
        own: numbers of the documents that it is about.
        near: numbers of others of the same article, the first to be put beside them.
    """

    text: str
    answers: tuple[str, ...]
    own: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class Questions:
    """A task of questions.

    Args:
        questions: asked in this order, each once.
        documents: all that there are.
        answer: tokens that are generated.
    """

    questions: Sequence[Question]
    documents: Sequence[str]
    answer: int = 32

    def samples(self, room: Room, seed: int) -> Iterator[Sample]:
        """Samples, as many as there are questions that fit.

        Raises:
            ModelError: none fits.
        """
        rng = random.Random(seed)

        def draw(question: Question, size: int) -> Sample:
            return self._sample(question, size, rng, seed)

        first = self.questions[0]
        most = room.most(draw(first, _STEP).prompt, _STEP)
        size = largest(lambda tried: draw(first, tried), _STEP, most, room)
        found = 0
        for question in self.questions:
            used = size
            while not room.holds((sample := draw(question, used)).prompt) and used > 1:
                used = max(1, used - _STEP)
            if room.holds(sample.prompt):
                found += 1
                yield sample
        if not found:
            raise room.too_short(draw(first, 1).prompt)

    def _sample(self, question: Question, size: int, rng: random.Random, seed: int) -> Sample:
        if size < len(self.documents):
            numbers = self._numbers(question, max(size, len(question.own)), rng)
            shown = [self.documents[number] for number in numbers]
        else:
            repeats = -(-size // len(self.documents))
            shown = (list(self.documents) * repeats)[:size]
        random.Random(seed).shuffle(shown)
        context = "\n\n".join(
            f"Document {number}:\n{document}" for number, document in enumerate(shown, 1)
        )
        return Sample(_TEXT.format(context=context, query=question.text), question.answers)

    def _numbers(self, question: Question, size: int, rng: random.Random) -> list[int]:
        own, near = list(question.own), list(question.near)
        more = size - len(own)
        if more <= len(near):
            return own + rng.sample(near, more)
        taken = {*own, *near}
        others = [number for number in range(len(self.documents)) if number not in taken]
        return own + near + rng.sample(others, more - len(near))


def read_questions(path: Path) -> tuple[str, Questions]:
    """A file of SQuAD's or HotpotQA's format, and the name of RULER's task that asks from it.

    Raises:
        ModelError: it is neither.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        name, questions = (
            ("qa_1", _squad(data)) if isinstance(data, Mapping) else ("qa_2", _hotpot(data))
        )
    except OSError as error:
        raise ModelError(f"`--qa` is {path}: {error.strerror}; name a file.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"`--qa` is {path}, neither SQuAD's format (data, paragraphs, qas) nor HotpotQA's (a "
            f"list of question, answer, context): {error!r}."
        ) from error
    if not questions.questions:
        raise ModelError(f"`--qa` is {path}, which asks nothing; name a file with questions.")
    return name, questions


def _squad(data: Mapping[str, Any]) -> Questions:
    articles = [[part["context"] for part in article["paragraphs"]] for article in data["data"]]
    documents = sorted({document for article in articles for document in article})
    place = {document: number for number, document in enumerate(documents)}
    questions = []
    for article in data["data"]:
        numbers = [place[part["context"]] for part in article["paragraphs"]]
        for part in article["paragraphs"]:
            own = place[part["context"]]
            near = tuple(number for number in numbers if number != own)
            for asked in part["qas"]:
                if not asked.get("is_impossible", False):
                    answers = tuple(answer["text"] for answer in asked["answers"])
                    questions.append(Question(asked["question"], answers, (own,), near))
    return Questions(questions, documents)


def _hotpot(data: Sequence[Mapping[str, Any]]) -> Questions:
    contexts = [
        [f"{title}\n{''.join(sentences)}" for title, sentences in asked["context"]]
        for asked in data
    ]
    documents = sorted({document for context in contexts for document in context})
    place = {document: number for number, document in enumerate(documents)}
    questions = [
        Question(asked["question"], (asked["answer"],), tuple(place[part] for part in context))
        for asked, context in zip(data, contexts, strict=True)
    ]
    return Questions(questions, documents)
