"""Recall without training: batches are read as Zoology writes them, filters score as they should.

What the filters score is computed again here in NumPy: ridge regression, the delta rule, a sum.
"""

import io
import json
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from recall import untrained
from recall.cli import main
from recall.mqar import UNLABELLED, RecallBatch, parse_batch, read_batch, shipped_batch

RECORD = Path(__file__).parent.parent / "results" / "recall_untrained.json"
VOCABULARY = 200


# -- batches by Zoology's definition -------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """A generated batch, and what was put into it."""

    inputs: np.ndarray
    labels: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    queries: np.ndarray
    answers: np.ndarray


def generate(
    seed, *, rows=5, length=48, pairs=6, updates=0, queries=None, random_filler=False
) -> Written:
    """Pairs, updates of some of their keys, then queries at random even places."""
    rng = np.random.default_rng(seed)
    queries = pairs if queries is None else queries
    inputs = np.zeros((rows, length), int)
    labels = np.full((rows, length), UNLABELLED)
    kept = {name: [] for name in ("keys", "values", "queries", "answers")}
    for row in range(rows):
        keys = rng.choice(np.arange(1, VOCABULARY // 2), pairs, replace=False)
        values = rng.choice(np.arange(VOCABULARY // 2, VOCABULARY), pairs + updates, replace=False)
        keys = np.concatenate([keys, rng.choice(keys, updates, replace=False)])
        context = 2 * len(keys)
        inputs[row, 0:context:2], inputs[row, 1:context:2] = keys, values
        if random_filler:
            inputs[row, context:] = rng.integers(0, VOCABULARY, length - context)
        asked = rng.choice(np.arange(context, length, 2), queries, replace=False)
        held = dict(zip(keys, values, strict=True))  # the last value of a key stays
        wanted = rng.choice(keys[:pairs], queries, replace=False)
        inputs[row, asked], labels[row, asked] = wanted, [held[key] for key in wanted]
        order = np.argsort(asked)
        kept["keys"].append(keys)
        kept["values"].append(values)
        kept["queries"].append(wanted[order])
        kept["answers"].append([held[key] for key in wanted[order]])
    return Written(inputs, labels, **{name: np.array(part) for name, part in kept.items()})


KINDS = {
    "zeros between": {},
    "random filler": {"random_filler": True},
    "overwritten keys": {"updates": 4},
    "overwritten keys, random filler": {"updates": 4, "random_filler": True},
    "fewer queries than pairs": {"queries": 3, "random_filler": True},
}


def assert_read_as_written(batch: RecallBatch, written: Written, pairs: int) -> None:
    np.testing.assert_array_equal(batch.keys, written.keys[:, :pairs])
    np.testing.assert_array_equal(batch.values, written.values[:, :pairs])
    np.testing.assert_array_equal(batch.queries, written.queries)
    np.testing.assert_array_equal(batch.answers, written.answers)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_a_batch_with_its_config_is_read_as_written(kind, seed):
    written = generate(seed, **kind)
    config = {"num_kv_pairs": 6, "num_updates": kind.get("updates", 0), "vocab_size": VOCABULARY}
    batch = parse_batch(written.inputs, written.labels, config)
    assert_read_as_written(batch, written, written.keys.shape[1])
    np.testing.assert_array_equal(batch.candidates, np.arange(VOCABULARY // 2, VOCABULARY))


def shortest_context(written: Written) -> int:
    """Fewest pairs after which every query's key last holds its answer, row by row."""
    for pairs in range(1, written.keys.shape[1] + 1):
        if all(
            dict(zip(keys[:pairs], values[:pairs], strict=True)).get(query) == answer
            for keys, values, queries, answers in zip(
                written.keys, written.values, written.queries, written.answers, strict=True
            )
            for query, answer in zip(queries, answers, strict=True)
        ):
            return pairs
    raise AssertionError("the generated batch has no answers")


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_without_config_the_shortest_context_that_answers_every_query_is_read(kind, seed):
    written = generate(seed, **kind)
    batch = parse_batch(written.inputs, written.labels)
    assert_read_as_written(batch, written, shortest_context(written))
    np.testing.assert_array_equal(batch.candidates, np.unique(batch.values))


def test_a_file_with_and_without_config_is_read_alike(tmp_path):
    written = generate(1, updates=2)
    np.savez(tmp_path / "plain.npz", inputs=written.inputs, labels=written.labels)
    config = json.dumps({"num_kv_pairs": 6, "num_updates": 2})
    np.savez(tmp_path / "told.npz", inputs=written.inputs, labels=written.labels, config=config)
    for name in ("plain.npz", "told.npz"):
        assert_read_as_written(read_batch(tmp_path / name), written, 8)


def test_the_shipped_batch_holds_eight_pairs_all_of_which_are_asked_for():
    batch = read_batch(shipped_batch())
    with np.load(shipped_batch()) as file:
        inputs, labels = file["inputs"], file["labels"]
    np.testing.assert_array_equal(batch.keys, inputs[:, 0:16:2])
    np.testing.assert_array_equal(batch.values, inputs[:, 1:16:2])
    assert batch.queries.shape == (64, 8)
    np.testing.assert_array_equal(np.sort(batch.queries), np.sort(batch.keys))
    np.testing.assert_array_equal(batch.answers.ravel(), labels[labels != UNLABELLED])
    np.testing.assert_array_equal(batch.candidates, np.arange(4096, 8192))
    without_config = parse_batch(inputs, labels)
    np.testing.assert_array_equal(without_config.keys, batch.keys)


# -- refusals ------------------------------------------------------------------------------------

GOOD = generate(0)


def relabelled(value) -> np.ndarray:
    """The good labels, with another answer to the first query of row 0."""
    labels = GOOD.labels.copy()
    labels[0, np.argmax(labels[0] != UNLABELLED)] = value
    return labels


def with_token(token) -> np.ndarray:
    inputs = GOOD.inputs.copy()
    inputs[0, 1] = token
    return inputs


def told(**config) -> dict:
    return {"inputs": GOOD.inputs, "labels": GOOD.labels, "config": json.dumps(config)}


REFUSED = {
    "no labels": ({"inputs": GOOD.inputs}, "holds inputs, but not labels"),
    "nothing": ({"other": GOOD.inputs}, "holds other, but not inputs, labels"),
    "shapes": ({"inputs": GOOD.inputs, "labels": GOOD.labels[:, :-1]}, "`labels` (5, 47)"),
    "one axis": ({"inputs": GOOD.inputs[0], "labels": GOOD.labels[0]}, "must be (row, position)"),
    "empty": ({"inputs": GOOD.inputs[:0], "labels": GOOD.labels[:0]}, "`inputs` is (0, 48)"),
    "fractions": ({"inputs": GOOD.inputs / 2, "labels": GOOD.labels}, "`inputs` is float64"),
    "no queries": (
        {"inputs": GOOD.inputs, "labels": np.full_like(GOOD.labels, UNLABELLED)},
        "rows hold 0 labels",
    ),
    "uneven rows": ({"inputs": GOOD.inputs, "labels": relabelled(UNLABELLED)}, "rows hold 5, 6"),
    "negative token": ({"inputs": with_token(-3), "labels": GOOD.labels}, "the token -3"),
    "negative label": ({"inputs": GOOD.inputs, "labels": relabelled(-1)}, "the token -1"),
    "huge token": ({"inputs": with_token(2**40), "labels": GOOD.labels}, f"reaches {2**40}"),
    "unwritten answer": ({"inputs": GOOD.inputs, "labels": relabelled(7)}, "with label 7, but no"),
    "wrong answer": (
        told(num_kv_pairs=6) | {"labels": relabelled(7)},
        f"among its 6 pairs the last pair with it holds {GOOD.answers[0, 0]}",
    ),
    "too few pairs": (told(num_kv_pairs=1), "among its 1 pairs no pair holds it"),
    "too many pairs": (told(num_kv_pairs=30), "`config` says 30 pairs, which take 60 positions"),
    "no pairs": (told(num_kv_pairs=0), "`config` says 0 pairs"),
    "pairs in words": (told(num_kv_pairs="six"), "`num_kv_pairs` in `config` is 'six'"),
    "updates below zero": (told(num_kv_pairs=6, num_updates=-1), "`num_updates` in `config` is -1"),
    "huge vocabulary": (told(num_kv_pairs=6, vocab_size=2**40), "`vocab_size` of `config` reaches"),
    "config is no JSON": (told() | {"config": "{pairs"}, "is not JSON"),
    "config is a list": (told() | {"config": "[6]"}, "is not a JSON object"),
    "config is a number": (told() | {"config": np.array(6)}, "is not a JSON object"),
}


def refusal(capsys, *arguments) -> str:
    """The one line that `mbd recall` says to a request it cannot meet."""
    assert main(["recall", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("mbd recall: ")
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(("held", "says"), REFUSED.values(), ids=REFUSED)
def test_a_batch_that_is_none_is_refused_in_one_line(held, says, tmp_path, capsys):
    np.savez(tmp_path / "batch.npz", **held)
    assert says in refusal(capsys, tmp_path / "batch.npz")


def test_a_missing_file_a_folder_and_other_files_are_refused_in_one_line(tmp_path, capsys):
    assert "there is no file" in refusal(capsys, tmp_path / "none.npz")
    assert "is a folder" in refusal(capsys, tmp_path)
    (tmp_path / "text.npz").write_text("key value")
    assert "is not a .npz file of plain arrays" in refusal(capsys, tmp_path / "text.npz")
    np.savez(tmp_path / "pickled.npz", inputs=np.array([{}], object), labels=GOOD.labels)
    assert "is not a .npz file of plain arrays" in refusal(capsys, tmp_path / "pickled.npz")
    np.save(tmp_path / "array.npy", GOOD.inputs)
    assert "is not a .npz file of plain arrays" in refusal(capsys, tmp_path / "array.npy")


@pytest.mark.parametrize("width", ["0", "-4", "1.5", "wide", "5000"])
def test_a_width_that_is_none_is_refused_in_one_line(width, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["recall", "--widths", width])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert width in said


# -- scores --------------------------------------------------------------------------------------

RATIO = 0.01
"""Noise variance over prior variance."""


def expected_score(batch: RecallBatch, filter: str, width: int, seed: int):
    """Accuracy, squared error and predicted variance, from the textbook."""
    tokens = max(part.max() for part in (batch.keys, batch.queries, batch.candidates)) + 1
    drawn = np.random.default_rng(seed).normal(size=(2, tokens, width))
    key_of, value_of = drawn / np.sqrt((drawn**2).sum(axis=-1, keepdims=True))
    right, errors, variances = [], [], []
    for row in range(len(batch.keys)):
        keys, values = key_of[batch.keys[row]], value_of[batch.values[row]]
        memory = np.zeros((width, width))
        match filter:
            case "exact":  # ridge regression of values on keys
                inverse = np.linalg.inv(keys.T @ keys + RATIO * np.eye(width))
                memory = values.T @ keys @ inverse
                uncertainty = RATIO * inverse
            case "reset":  # the delta rule; what is left uncertain is due to the last write alone
                strength = 1 / (1 + RATIO)
                for key, value in zip(keys, values, strict=True):
                    memory += strength * np.outer(value - memory @ key, key)
                uncertainty = np.eye(width) - strength * np.outer(keys[-1], keys[-1])
            case "additive":  # the sum of outer products; every write leaves its own uncertainty
                memory = sum(np.outer(value, key) for key, value in zip(keys, values, strict=True))
                left = len(keys) * RATIO / (1 + RATIO)
                uncertainty = (1 + left) * np.eye(width)
        for token, answer in zip(batch.queries[row], batch.answers[row], strict=True):
            query = key_of[token]
            distances = np.sum((memory @ query - value_of[batch.candidates]) ** 2, axis=-1)
            right.append(batch.candidates[np.argmin(distances)] == answer)
            errors.append(np.sum((memory @ query - value_of[answer]) ** 2))
            variances.append(query @ uncertainty @ query)  # width rows of 1 / width each
    return np.mean(right), np.mean(errors), np.mean(variances)


@pytest.fixture(scope="module")
def recalled(tmp_path_factory):
    """A batch of more rows than are read at once, recalled by the command."""
    folder = tmp_path_factory.mktemp("recall")
    written = generate(3, rows=8, updates=3, queries=4, random_filler=True)
    config = json.dumps({"num_kv_pairs": 6, "num_updates": 3, "vocab_size": VOCABULARY})
    path = folder / "batch.npz"
    np.savez(path, inputs=written.inputs, labels=written.labels, config=config)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as said:
        patch.setattr(untrained, "_ROWS_AT_ONCE", 4)
        patch.setattr(untrained, "_PRODUCTS_AT_ONCE", 1000)  # decoded in several chunks
        arguments = ["--widths", "5", "--seed", "4", "--json", str(folder / "record.json")]
        assert main(["recall", str(path), *arguments]) == 0
    return read_batch(path), json.loads((folder / "record.json").read_text()), said.getvalue()


@pytest.mark.slow
def test_every_filter_scores_what_its_textbook_form_scores(recalled):
    batch, record, _ = recalled
    assert_scores(record["metrics"], batch, [5], seed=4)


def assert_scores(scores, batch: RecallBatch, widths: list[int], seed: int) -> None:
    assert [(score["filter"], score["width"]) for score in scores] == [
        (filter, width) for filter in ("exact", "reset", "additive") for width in widths
    ]
    for score in scores:
        found = [score[name] for name in ("accuracy", "squared_error", "predicted_variance")]
        wanted = expected_score(batch, score["filter"], score["width"], seed)
        np.testing.assert_allclose(found, wanted, rtol=1e-9)


@pytest.mark.slow
def test_the_table_holds_the_scores_of_the_record(recalled):
    _, record, said = recalled
    assert said.startswith("batch.npz: 8 rows, 9 writes and 4 queries each, 100 candidate values")
    lines = [line.replace("│", " ").split() for line in said.splitlines() if line.startswith("│")]
    assert [line[-4:] for line in lines] == [
        [
            str(score["width"]),
            f"{score['accuracy']:.3f}",
            f"{score['squared_error']:.4f}",
            f"{score['predicted_variance']:.4f}",
        ]
        for score in record["metrics"]
    ]
    note = " ".join(said.splitlines()[-3:])
    assert "from the value last written with the key" in note
    assert "without observation noise" in note


@pytest.mark.slow
def test_the_record_says_how_to_make_it_again(recalled):
    _, record, _ = recalled
    assert record["command"].endswith("batch.npz --widths 5 --seed 4")
    assert record["config"]["widths"] == [5]
    assert record["config"]["noise_ratio"] == RATIO
    assert record["seed"] == 4


def test_the_published_record_holds_what_the_textbook_forms_score_on_the_shipped_batch():
    record = json.loads(RECORD.read_text())
    for part in ("config", "command", "commit", "versions", "device", "seed", "metrics"):
        assert record[part] is not None, part
    widths = record["config"]["widths"]
    assert record["config"]["file"] == shipped_batch().name
    assert_scores(record["metrics"], read_batch(shipped_batch()), widths, record["seed"])
