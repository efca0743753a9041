"""RULER: texts as upstream draws them, answers as the model says them, scores as upstream counts.

Texts are compared with those that upstream's own generators made (`data/ruler_golden.json`), scores
with its formulas, generation with the likeliest next token of a full pass.
"""

import json
import re
from hashlib import sha256
from itertools import islice
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from design_models import ModelError
from recall.checkpoints import names
from recall.checkpoints.configuration import configuration_of
from recall.checkpoints.folder import read_checkpoint
from recall.checkpoints.model import logits
from recall.cli import main
from recall.ruler import cells, generation
from recall.ruler.catalogue import TASKS, question_task
from recall.ruler.cells import Cell, Texts, measure
from recall.ruler.generation import Generator
from recall.ruler.inputs import chosen_tasks, read_prose
from recall.ruler.questions import read_questions
from recall.ruler.samples import Room
from recall.ruler.scores import found_all, found_any, interval
from recall.ruler.tokens import vocabulary_of
from recall.ruler.words import Pairs, adjectives_with_nouns
from recall.ruler_command import TASK_NAMES

UPSTREAM = json.loads((Path(__file__).parent / "data" / "ruler_golden.json").read_text())
SETTINGS = {
    "model_type": "gated_deltanet",
    "vocab_size": 257,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_heads": 2,
    "head_dim": 8,
    "intermediate_size": 20,
    "eos_token_id": 10,
}
END = 10


def word_count(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]+", text))


def byte_tokenizer() -> Tokenizer:
    """Bytes are 0 to 255, and 256 begins texts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint with random weights, and a tokenizer of bytes."""
    path = tmp_path_factory.mktemp("checkpoint")
    rng = np.random.default_rng(0)
    weights = {
        name: (0.5 * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in names.shapes(configuration_of(SETTINGS)).items()
    }
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(SETTINGS))
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return path


def the_words() -> list[str]:
    return read_prose(None).split()


# -- texts ---------------------------------------------------------------------------------------


def named(golden) -> str:
    return f"{golden['task']}-{golden['length']}-{golden['seed']}"


def fingerprint(samples) -> str:
    joined = "\n".join("\x1f".join([one.prompt, *one.answers]) for one in samples)
    return sha256(joined.encode()).hexdigest()


@pytest.mark.parametrize("golden", UPSTREAM["cells"], ids=named)
def test_texts_are_upstreams_to_the_letter(golden):
    drawn = TASKS[golden["task"]].samples(golden["length"], golden["seed"], word_count, ())
    samples = list(islice(drawn, 3))
    assert samples[0].answers == tuple(golden["answers"])
    assert fingerprint(samples) == golden["sha256"]


@pytest.mark.parametrize("length", [1024, 4096])
@pytest.mark.parametrize("name", TASK_NAMES)
def test_texts_fill_the_length_and_leave_room_for_the_answer(name, length):
    task = TASKS[name]
    for sample in islice(task.samples(length, 5, word_count, the_words()), 4):
        taken = word_count(sample.prompt) + task.drawn.answer
        assert 0.85 * length < taken <= length
        if name not in ("cwe", "fwe", "vt"):
            assert all(sample.prompt.count(f"is: {answer}.") == 1 for answer in sample.answers)


def test_prose_is_read_from_its_first_word_on_and_again_where_it_runs_out():
    words = [*(f"word{n}" for n in range(198)), "last.", "First"]
    sample = next(TASKS["niah_multivalue_prose"].samples(1024, 0, word_count, words))
    context = re.sub(r"One of the special magic numbers for [^:]*: \d+\. ?", "", sample.prompt)
    shown = context.split("\n")[1].split()
    assert len(shown) > 400
    assert shown == (words * 10)[: len(shown)]


def test_needles_lie_at_any_depth_of_the_prose():
    words = [f"Word{n}." for n in range(400)]
    depths = []
    for sample in islice(TASKS["niah_single_2_prose"].samples(1024, 1, word_count, words), 400):
        before, rest = sample.prompt.split("One of the special magic", 1)
        whole = before.count("Word") + rest.count("Word")
        depths.append(round(39 * before.count("Word") / whole))
    counts = np.bincount(depths, minlength=40)
    assert len(counts) == 40  # upstream's forty depths, alike
    assert stats.chisquare(counts).pvalue > 1e-3


def test_several_values_are_asked_as_upstream_asks_them():
    prompt = next(TASKS["niah_multiquery_prose"].samples(1024, 3, word_count, the_words())).prompt
    assert prompt.startswith("Some special magic numbers are hidden within the following text. ")
    question = prompt.rsplit("\n", 1)[1]
    keys = r"(\S+), (\S+), (\S+), and (\S+)"
    asked = rf"What are all the special magic numbers for {keys} mentioned in the provided text\?"
    told = r" The special magic numbers for \1, \2, \3, and \4 mentioned in the provided text are"
    assert re.fullmatch(asked + told, question)


@given(
    st.sets(st.sampled_from(["a", "ab", "a-a", "a-b", "a-a-c", "b", "b c"]), min_size=1),
    st.sets(st.sampled_from(["a", "a-c", "b", "b-a", "c", "é"]), min_size=1),
)
def test_pairs_of_words_are_in_the_order_of_all_pairs(firsts, seconds):
    expected = sorted({f"{first}-{second}" for first in firsts for second in seconds})
    assert list(Pairs(sorted(firsts), sorted(seconds))) == expected


def test_there_are_as_many_keys_as_upstream_has():
    keys = adjectives_with_nouns()
    assert len(keys) == 6_171_620
    assert (keys[0], keys[-1]) == ("Early-ATM", "zonked-zucchini")


# -- questions on the user's documents -----------------------------------------------------------

SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"Article {article}, part {part}, is about thing{article}{part}.",
                    "qas": [
                        {
                            "question": f"What is part {part} of {article} about?",
                            "answers": [{"text": f"thing{article}{part}"}, {"text": "it"}],
                            "is_impossible": part == 2,
                        }
                    ],
                }
                for part in range(3)
            ]
        }
        for article in range(30)
    ]
}
HOTPOT = [
    {
        "question": f"Who is {number}?",
        "answer": f"name{number}",
        "context": [
            [
                f"title{number}{part}",
                [f"It is name{number}.", " More."] * (40 if number == 1 else 1),
            ]
            for part in range(10)
        ],
    }
    for number in range(12)
]


@pytest.mark.parametrize(
    ("data", "name", "asked"),
    [(SQUAD, "qa_1", 60), (HOTPOT, "qa_2", 11)],
    ids=["SQuAD", "HotpotQA"],
)
def test_questions_are_asked_with_their_own_documents_among_others(tmp_path, data, name, asked):
    file = tmp_path / "qa.json"
    file.write_text(json.dumps(data))
    found, questions = read_questions(file)
    samples = list(question_task(found, questions).samples(600, 42, word_count, ()))
    assert found == name
    assert len(samples) == asked  # those that cannot be answered, or do not fit, are left out
    for sample in samples:
        assert 300 < word_count(sample.prompt) + 32 <= 600
        assert sample.answers[0] in sample.prompt
        numbers = [int(n) for n in re.findall(r"Document (\d+):\n", sample.prompt)]
        assert numbers == list(range(1, len(numbers) + 1))
        assert sample.prompt.endswith(" Answer:")


@pytest.mark.parametrize("golden", UPSTREAM["questions"], ids=named)
def test_questions_are_upstreams_to_the_letter(tmp_path, golden):
    file = tmp_path / "qa.json"
    short = [one for number, one in enumerate(HOTPOT) if number != 1]  # which all fit
    file.write_text(json.dumps(SQUAD if golden["task"] == "qa_1" else short))
    drawn = question_task(*read_questions(file))
    samples = drawn.samples(golden["length"], golden["seed"], word_count, ())
    assert fingerprint(islice(samples, 11)) == golden["sha256"]


# -- scores --------------------------------------------------------------------------------------


def test_scores_are_upstreams():
    said = ["It is 12 and\x07ABC.", "nothing", " x\x00 ", "abc\x01"]
    right = [("12", "abc", "77"), ("thing", "o"), ("x",), ("abc",)]

    def cleaned(text):  # upstream's postprocess_pred
        return re.compile(r"[\x00-\x1f]").sub("\n", text.strip()).strip()

    for text, refs in zip(said, right, strict=True):
        hits = [1.0 if r.lower() in cleaned(text).lower() else 0.0 for r in refs]
        assert found_all(text, refs) == sum(hits) / len(refs)
        assert found_any(text, refs) == max(hits)


@pytest.mark.parametrize(("hits", "count"), [(0, 7), (3, 20), (199, 200), (500, 500)])
def test_intervals_are_wilsons(hits, count):
    expected = stats.binomtest(hits, count).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(interval(hits / count, count), expected, atol=1e-12)


class Oracle:
    """Says the right answer to every other text, in the other letter case."""

    def __init__(self) -> None:
        self.asked = 0

    def rows(self, length):
        return 3

    def __call__(self, texts, length, count):
        assert len(texts) <= 3
        assert all(text[0] == 256 and len(text) + count <= length + 1 for text in texts)
        said = []
        for text in texts:
            prompt = byte_tokenizer().decode(text.tolist())
            key = re.search(r"number for (\S+) mentioned in the provided text is$", prompt)
            assert key is not None
            value = re.search(rf"for {re.escape(key[1])} is: (\d+)", prompt)
            assert value is not None
            self.asked += 1
            right = value[1] if self.asked % 2 else "0"
            said.append(np.asarray(byte_tokenizer().encode(right).ids[1:], np.int32))
        return said


def test_a_cell_scores_what_was_said_after_every_sample():
    beside = {"tokenizer.json": byte_tokenizer().to_str().encode()}
    vocabulary = vocabulary_of(beside, 257)
    cell = measure(TASKS["niah_single_1"], 1024, Texts(8, 42, ()), vocabulary, Oracle())
    assert [answer.score for answer in cell.answers] == [1.0, 0.0] * 4
    assert cell.as_record() | {"seconds": 0} == {
        "task": "niah_single_1",
        "length": 1024,
        "score": 50.0,
        "interval": [21.52, 78.48],
        "samples": 8,
        "tokens_read": pytest.approx(np.mean([one.read for one in cell.answers]), abs=0.06),
        "empty": 0,
        "seconds": 0,
    }


# -- generation ----------------------------------------------------------------------------------


def test_what_is_said_is_the_likeliest_token_after_each_text_alone(folder):
    model = read_checkpoint(folder).model
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, 257, size).astype(np.int32) for size in (40, 33, 1)]
    expected = [_likeliest(model, text, 12) for text in texts]
    end = int(expected[1][4])  # after which nothing is said
    said = Generator(model, [end], 128, rows=4)(texts, 1024, 12)
    for found, wanted in zip(said, expected, strict=True):
        ends = np.flatnonzero(np.asarray(wanted) == end)
        assert found.tolist() == wanted[: ends[0] if len(ends) else 12]
    assert len(said[1]) <= 4


def _likeliest(model, text, count) -> list[int]:
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(text)] = text
    for place in range(len(text), len(text) + count):
        tokens[0, place] = np.argmax(np.asarray(logits(model, jnp.asarray(tokens)))[0, place - 1])
    return tokens[0, len(text) : len(text) + count].tolist()


def test_half_precision_keeps_states_in_full(folder):
    generator = Generator(read_checkpoint(folder).model, [], 16, rows=1, dtype="bfloat16")
    x = eqx.filter_eval_shape(generation._through, generator._model.blocks[0], *_shapes())
    assert x[0].dtype == jnp.bfloat16
    assert x[1].memories.mean.dtype == jnp.float32


def _shapes():
    return (
        jax.ShapeDtypeStruct((1, 8, 16), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, 8), jnp.bool_),
    )


# -- the command ---------------------------------------------------------------------------------


def test_the_command_measures_and_goes_on_where_it_was(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    words = ["ruler", str(folder), "--out", str(out), "--lengths", "1024", "--samples", "2"]
    words += ["--rows", "4"]
    assert main([*words, "--tasks", "niah_single_1"]) == 0
    kept = json.loads((out / "cells" / "niah_single_1-1024.json").read_text())
    assert [len(answer["right"][0]) for answer in kept["answers"]] == [7, 7]

    def measured(task, length, *rest):
        assert task.name == "fwe"  # the other is kept
        return Cell(task.name, length, (cells.Answer(900, ("a",), "A b", 1.0),), 0.5)

    monkeypatch.setattr(cells, "measure", measured)
    record_file = tmp_path / "record.json"
    both = [*words, "--tasks", "fwe,niah_single_1", "--json", str(record_file)]
    assert main(both) == 0
    record = json.loads(record_file.read_text())
    assert {cell["task"]: cell["score"] for cell in record["metrics"]}["fwe"] == 100
    assert record["config"]["lengths"] == [1024]
    assert record == json.loads((out / "record.json").read_text())
    assert (out / "ruler.png").stat().st_size > 0
    printed = capsys.readouterr()
    assert "100.0 [20.7, 100.0]" in printed.out
    assert printed.err == ""
    assert main([*both, "--seed", "7"]) == 2
    assert "other seed (42, now 7); name another folder" in capsys.readouterr().err


def test_requests_that_cannot_be_met_are_refused_in_one_line(folder, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    neither = tmp_path / "neither.json"
    neither.write_text('{"data": 3}')
    refused = {
        "`--lengths` is 300, too short for vt": [str(folder), "--lengths", "300", "--tasks", "vt"],
        "`--tasks` names 'niah'; known: niah_single_1,": [str(folder), "--tasks", "niah"],
        "give its data, --qa FILE in SQuAD's format": [str(folder), "--tasks", "qa_1"],
        "`--qa` is": [str(folder), "--qa", str(neither)],
        "`--prose` is": [str(folder), "--prose", str(tmp_path / "none.txt")],
        "holds no tokenizer.json": [str(bare)],
    }
    for message, words in refused.items():
        assert main(["ruler", *words, "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


@pytest.mark.parametrize("name", TASK_NAMES)
def test_a_length_without_room_is_refused(name):
    task = TASKS[name]
    with pytest.raises(ModelError, match=f"`--lengths` is 150, too short for {name}: .* tokens"):
        next(task.samples(150, 0, word_count, the_words()))


def test_the_command_names_all_tasks():
    assert list(TASKS) == list(TASK_NAMES) == [task.name for task in chosen_tasks(None, [])]


def test_words_run_out_in_one_line():
    room = Room("cwe", 10**6, 120, word_count)
    with pytest.raises(ModelError, match="knows 8166 words, too few for so long a text"):
        next(TASKS["cwe"].drawn.samples(room, 0))
