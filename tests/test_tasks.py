"""Recall tasks: the original batches bit for bit, and the rule that decides every label."""

import json
from pathlib import Path

import numpy as np
import pytest

from design_models import ModelError
from recall.cli import main
from recall.mqar import UNLABELLED, read_batch, shipped_batch
from recall.task_options import TASK_NAMES
from recall.tasks import associative, mad, zoology
from recall.tasks.associative import ASKED, AssociativeRecall
from recall.tasks.catalogue import TASKS, draw
from recall.tasks.mad import FuzzyRecall, InContextRecall, SelectiveCopy
from recall.tasks.zoology import Zoology

DATA = Path(__file__).parent / "data"

# -- Zoology -------------------------------------------------------------------------------------

GOLDEN = {
    "a": (shipped_batch(), Zoology(8192, 64, 8), 64, 1234, None),
    "b": (DATA / "golden_mqar_b.npz", Zoology(8192, 128, 16), 64, 5678, 777),
    "forgetting": (DATA / "golden_mqar_forgetting.npz", Zoology(8192, 128, 16, 8), 32, 99, None),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_rows_are_those_of_the_original_generator_bit_for_bit(name):
    path, rows, examples, seed, filler_seed = GOLDEN[name]
    inputs, labels = zoology.draw(rows, examples, seed, filler_seed)
    golden = np.load(path)
    np.testing.assert_array_equal(inputs, golden["inputs"])
    np.testing.assert_array_equal(labels, golden["labels"])
    assert (inputs.dtype, labels.dtype) == (golden["inputs"].dtype, golden["labels"].dtype)
    config = draw(rows, examples, seed, filler_seed=filler_seed).config
    theirs = json.loads(str(golden["config"]))
    assert {n: config[n] for n in theirs if n != "generator"} == {
        n: value for n, value in theirs.items() if n != "generator"
    }


@pytest.mark.parametrize("overwrites", [0, 3])
@pytest.mark.parametrize("filler_seed", [None, 5])
def test_every_key_is_asked_once_for_the_value_last_written(overwrites, filler_seed):
    rows = Zoology(200, 48, 6, overwrites)
    inputs, labels = zoology.draw(rows, 20, 3, filler_seed)
    for tokens, label in zip(inputs, labels, strict=True):
        memory = {}
        for key, value in tokens[: rows.context].reshape(-1, 2):
            memory[key] = value
        asked = np.flatnonzero(label != UNLABELLED)
        assert all(asked >= rows.context)
        assert sorted(tokens[asked]) == sorted(memory)
        assert [memory[key] for key in tokens[asked]] == label[asked].tolist()
        rest = np.delete(tokens[rows.context :], asked - rows.context)
        assert filler_seed is not None or not rest.any()


# -- MAD -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [InContextRecall(), InContextRecall(32, 64, 16, 0.4)])
def test_in_context_recall_asks_for_keys_that_came_before(rows):
    inputs, labels = mad.draw(rows, 30, 7, training=False)
    shifted, following = mad.draw(rows, 30, 7, training=True)
    np.testing.assert_array_equal(inputs, shifted)
    np.testing.assert_array_equal(following[:, :-1], inputs[:, 1:])
    size = rows.vocabulary - rows.noise_vocabulary
    for tokens, label in zip(np.c_[inputs, following[:, -1]], labels, strict=True):
        memory = {}
        for place in range(0, rows.length, 2):
            key, value = tokens[place : place + 2]
            expected = UNLABELLED
            if key < size:
                assert key < size // 2 <= value < size
                assert memory.get(key, value) == value
                expected = memory.get(key, UNLABELLED)
                memory[key] = value
            assert label[place] == expected
            assert place == 0 or label[place - 1] == UNLABELLED
        assert label[-1] != UNLABELLED


def test_a_row_of_nothing_but_noise_still_asks_for_a_pair():
    inputs, labels = mad.draw(InContextRecall(8, 4, 4, 0.999), 400, 0, training=False)
    assert np.all(labels[:, -1] != UNLABELLED)
    assert np.all(inputs[:, -1] < 2)


def test_fuzzy_recall_asks_for_the_motif_that_followed_the_key():
    rows = FuzzyRecall(16, 96, 2, 3)
    inputs, labels = mad.draw(rows, 30, 1, training=False)
    assert inputs.shape == labels.shape == (30, 96)
    for tokens, label in zip(inputs, labels, strict=True):
        answer = label[label.size - np.argmax(label[::-1] == UNLABELLED) :]
        start = label.size - answer.size - rows.key_motif + 1
        key = tuple(tokens[start : start + rows.key_motif])
        assert len(set(key)) == rows.key_motif  # a permutation of different tokens
        assert all(token < 7 for token in key)
        assert all(7 <= token < 15 for token in answer)
        earlier = [
            tuple(tokens[p + rows.key_motif : p + rows.key_motif + answer.size]) == tuple(answer)
            for p in range(start)
            if tuple(tokens[p : p + rows.key_motif]) == key
        ]
        assert any(earlier)


def test_selective_copy_asks_for_the_tokens_without_the_blanks():
    rows = SelectiveCopy(10, 40, 6)
    inputs, labels = mad.draw(rows, 30, 2, training=False)
    blank, sign = 8, 9
    for tokens, label in zip(inputs, labels, strict=True):
        place = int(np.argmax(tokens == sign))
        assert place == rows.length - rows.copied - 1
        told = tokens[:place][tokens[:place] != blank]
        assert tokens[place - 1] != blank
        np.testing.assert_array_equal(label[place + 1 :], told)
        assert np.all(label[: place + 1] == UNLABELLED)


# -- continuous ----------------------------------------------------------------------------------


def test_associative_recall_asks_for_every_key_once_in_its_latest_value():
    rows = AssociativeRecall(codes=32, pairs=5, passes=2, revisions=3)
    inputs, labels = associative.draw(rows, 40, 4)
    assert inputs.shape[1] == rows.length == 18
    orders = set()
    for pairs, label in zip(inputs, labels, strict=True):
        memory = {}
        for place, (key, value) in enumerate(pairs[:13]):
            revised = place >= 10 and memory[key] == value
            assert not revised
            memory[key] = value
        assert np.all(pairs[13:, 1] == ASKED)
        assert [memory[key] for key in pairs[13:, 0]] == label[13:].tolist()
        assert np.all(label[:13] == UNLABELLED)
        assert len(memory) == 5
        orders.add(tuple(np.argsort(pairs[13:, 0])))
    assert len(orders) > 20


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
def test_directions_have_length_one_and_their_overlap(overlap):
    found = associative.directions(300, 64, overlap, 0)
    products = found @ found.T
    np.testing.assert_allclose(np.diag(products), 1, atol=1e-12)
    off = products[~np.eye(300, dtype=bool)]
    assert np.mean(off) == pytest.approx(overlap, abs=0.005)


# -- the command ---------------------------------------------------------------------------------


def test_the_command_names_the_tasks_there_are():
    assert tuple(TASKS) == TASK_NAMES


@pytest.mark.parametrize("name", TASK_NAMES)
def test_every_task_writes_a_batch(name, tmp_path, capsys):
    out = tmp_path / "batch.npz"
    assert main(["batch", name, "--examples", "3", "--seed", "2", "--out", str(out)]) == 0
    held, expected = np.load(out), draw(TASKS[name].rows, 3, 2)
    np.testing.assert_array_equal(held["inputs"], expected.inputs)
    np.testing.assert_array_equal(held["labels"], expected.labels)
    assert json.loads(str(held["config"])) == expected.config
    assert "wrote" in capsys.readouterr().out


def test_a_written_batch_is_one_that_recall_reads(tmp_path):
    out = tmp_path / "batch.npz"
    wish = ["--length", "32", "--pairs", "4", "--overwrites", "2", "--filler-seed", "1"]
    assert main(["batch", "mqar_overwrite", *wish, "--out", str(out)]) == 0
    batch = read_batch(out)
    assert (batch.keys.shape, batch.queries.shape) == ((64, 6), (64, 4))


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        (["mqar", "--copied", "3"], "mqar has no `--copied`; it takes --vocab, --length, --pairs"),
        (["mqar", "--pairs", "40"], "40 pairs, 0 overwrites and 40 queries take 160 positions"),
        (["mqar", "--length", "63"], "`length` is 63"),
        (["mqar", "--power", "0"], "`power` is 0.0; it must be above 0"),
        (["mqar", "--training"], "`training` is for MAD's recall tasks"),
        (["mqar_overwrite", "--overwrites", "17"], "`overwrites` is 17"),
        (["collision", "--overlap", "1"], "`overlap` is 1.0"),
        (["collision", "--filler-seed", "1"], "this task has no filler"),
        (["noisy_recall", "--noise", "1"], "`noise` is 1.0"),
        (["in_context_recall", "--noise", ".5"], "needs tokens of its own"),
        (["fuzzy_recall", "--length", "18"], "take more than 18"),
        (["fuzzy_recall", "--vocab", "5"], "`vocab` is 5; this task needs at least 7"),
        (["selective_copy", "--copied", "200"], "`copied` is 200"),
    ],
)
def test_rows_that_make_no_sense_are_refused_in_one_line(wish, says, tmp_path, capsys):
    out = tmp_path / "batch.npz"
    assert main(["batch", *wish, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_folder_that_does_not_exist_is_named(tmp_path, capsys):
    out = tmp_path / "nowhere" / "batch.npz"
    assert main(["batch", "mqar", "--out", str(out)]) == 2
    assert f"`--out` is {out}" in capsys.readouterr().err


def test_a_law_is_checked_where_it_is_made():
    with pytest.raises(ModelError, match="`pairs` is 9"):
        AssociativeRecall(codes=8, pairs=9)
    with pytest.raises(ModelError, match="`passes` is 0"):
        AssociativeRecall(passes=0)
