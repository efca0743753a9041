"""Text as tokens, and Gated DeltaNets that are trained on it and distilled."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoints import SMALL, checkpoint, drawn

from design_models import ModelError
from layers import LanguageModel
from layers.kernels import delta_rule
from layers.rules import Reset
from layers.scans import filter_scan
from layers.stream import Belief, Stream
from recall.checkpoints.configuration import configuration_of
from recall.checkpoints.folder import read_checkpoint
from recall.checkpoints.model import model_of
from recall.checkpoints.surgery import dials, restorations, with_restoration
from recall.cli import main
from recall.language import scores
from recall.language.inside import inside
from recall.language.objectives import on_layers, on_teacher, on_text
from recall.language.training import Descent, make_step, mesh_of, started
from recall.text.corpus import MARK, Mixture, asked_rows, corpus_at
from recall.text.documents import read_documents
from recall.text.needles import FORMS, Sources, needle_text, sources_of
from recall.text.vocabulary import encoded, encoded_documents, end_token, train_vocabulary

PROSE = "\x1e".join(
    f"Once upon a time, in the year {year}, a miller had nothing but his mill.\n\n"
    "He gave the cat to his youngest son; she asked for a pair of boots, and went hunting."
    for year in range(1700, 1760)
)
VOCABULARY = train_vocabulary([PROSE], 300)
CONFIGURATION = configuration_of(SMALL)


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "prose.txt").write_text(PROSE, encoding="utf-8")
    return tmp_path / "prose.txt"


def model() -> LanguageModel:
    return model_of(CONFIGURATION, drawn(CONFIGURATION, size=0.3))


def rows(count: int = 4, length: int = 20, seed: int = 0) -> np.ndarray:
    """Two documents each, the first of ten tokens; some tokens are marked as answers."""
    rng = np.random.default_rng(seed)
    found = rng.integers(1, CONFIGURATION.vocabulary, (count, length + 1)).astype(np.uint16)
    found = np.where(rng.random(found.shape) < 0.2, found | MARK, found).astype(np.uint16)
    found[:, 9] = 0
    return found


scores_of = eqx.filter_jit(lambda model, tokens: model(tokens)[0])


@eqx.filter_jit
def told(objective, model, frozen, rows):
    goal = objective(model, frozen, rows)
    return goal.total, goal.weight


def test_documents_are_told_apart_and_none_is_empty(text):
    assert len(read_documents([text])) == 60


def test_every_digit_is_a_token_and_any_text_comes_back():
    (tokens,) = encoded(VOCABULARY, ["in 1984: ψ"])
    spelled = [VOCABULARY.id_to_token(int(token)) for token in tokens]
    assert [one for one in spelled if any(map(str.isdigit, one))] == list("1984")
    assert VOCABULARY.decode(tokens.tolist()) == "in 1984: ψ"


def test_cutting_long_documents_changes_no_token():
    document = (PROSE.replace("\x1e", "\n") + "\n\n\n x") * 8
    expected = np.append(encoded(VOCABULARY, [document])[0], end_token(VOCABULARY))
    np.testing.assert_array_equal(encoded_documents(VOCABULARY, [document]), expected)


@pytest.mark.parametrize("name", FORMS)
def test_what_is_asked_for_is_hidden_once_in_the_text(name):
    form, sources = FORMS[name], sources_of(read_prose())
    text = needle_text(form, sources, 1500, np.random.default_rng(3))
    said = text.answer.strip(" .").split(", ")
    assert len(said) == form.each * form.asked
    for value in said:
        assert text.prompt.count(f" is: {value}.") == 1
    if len(said) == 1:
        key = text.prompt.rpartition(" for ")[2].removesuffix(" mentioned in the provided text is")
        assert f"One of the special magic {form.values} for {key} is: {said[0]}." in text.prompt


def read_prose() -> list[str]:
    return [part.strip() for part in PROSE.split("\x1e")]


def test_batches_are_the_same_again_and_hold_whole_needle_texts(text, tmp_path):
    mixture = Mixture(length=700, needles=0.5, rows=6)
    corpus = corpus_at(tmp_path / "cache", VOCABULARY, [text], [], mixture)
    again = corpus_at(tmp_path / "cache", VOCABULARY, [text], [], mixture)
    np.testing.assert_array_equal(corpus.batch(4, 1, 7), again.batch(4, 1, 7))
    marked = (corpus.batch(4, 1, 7) >= MARK).any(axis=1)
    assert marked.sum() == 2
    for row in corpus.needles:
        ends = np.flatnonzero(row == corpus.end)
        assert row[ends[0] - 1] >= MARK
        assert row[0] < MARK


def test_rows_to_ask_end_with_an_answer():
    sources = Sources(["stone", "grass"], read_prose())
    asked = asked_rows(VOCABULARY, sources, FORMS["single, prose"], 600, 3, 0)
    assert asked.shape == (3, 601)
    assert (asked[:, -1] == end_token(VOCABULARY)).all()
    assert (asked[:, -2] >= MARK).all()
    with pytest.raises(ModelError, match="too short"):
        asked_rows(VOCABULARY, sources, FORMS["multikey, needles, uuids"], 60, 3, 0)


def test_the_loss_is_of_each_document_alone_over_tokens_that_go_on():
    own, shown = model(), rows(2)
    total, weight = told(on_text(0, "float32", answers=3.0), own, None, jnp.asarray(shown))
    expected = counted = 0.0
    for row in shown:
        tokens, marked = row % MARK, row >= MARK
        for start in (0, 10):
            read = jnp.asarray(tokens[start : start + 10], jnp.int32)
            scores = np.asarray(scores_of(own, read), np.float64)
            for t in range(10):
                if tokens[start + t] == 0:
                    continue
                size = 3.0 if marked[start + t + 1] else 1.0
                surprise = np.log(np.exp(scores[t]).sum()) - scores[t, tokens[start + t + 1]]
                expected, counted = expected + size * surprise, counted + size
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(weight, counted)


def test_a_teacher_is_matched_by_its_own_layers_and_taught_by_its_own_answers():
    teacher, shown = model(), jnp.asarray(rows(2))
    students = [
        with_restoration(teacher, layers=[1], restoration=restoration) for restoration in (0.0, 1.0)
    ]
    objectives = on_layers(0, "float32", [1]), on_teacher(0, "float32", task=0.0, answers=1.0)
    for objective in objectives:
        same, other = (told(objective, student, teacher, shown)[0] for student in students)
        assert abs(same) < 1e-5
        assert other > 1e-3


def test_matching_layers_holds_restorations_and_moves_the_other_dials():
    teacher = model()
    student = with_restoration(teacher, layers=[1], restoration=0.5)
    descent = Descent(rate=1e-3, dial_rate=0.1, steps=2, warmup=1)
    matching = make_step(
        on_layers(0, "float32", [1]), descent, started(student), teacher, mesh_of(1)
    )
    training, told = matching(started(student), rows(), 0)
    before, after = dials(student.blocks[1].mixer), dials(training.model.blocks[1].mixer)
    np.testing.assert_array_equal(after["restoration"], before["restoration"])
    for name in ("reset", "stationary.bias"):
        np.testing.assert_allclose(abs(after[name] - before[name]), 0.1, rtol=1e-2)
    assert told["loss"] > 0
    moved = training.model.blocks[1].mixer.out - student.blocks[1].mixer.out
    assert 0 < float(abs(moved).max()) < 2e-3


def test_an_answer_counts_as_found_where_all_its_tokens_are_likeliest():
    own, score = model(), scores.retrieval_scorer(0, mesh_of(1), "float32")
    shown = np.maximum(rows(1) % MARK, 1).astype(np.uint16)
    for place in (19, 20):  # as the model itself would go on
        likeliest = scores_of(own, jnp.asarray(shown[0, :-1], jnp.int32)).argmax(axis=-1)
        shown[0, place] = likeliest[place - 1]
    shown[0, 5] = next(token for token in (1, 2) if token != likeliest[4])
    for place in (19, 20):
        likeliest = scores_of(own, jnp.asarray(shown[0, :-1], jnp.int32)).argmax(axis=-1)
        shown[0, place] = likeliest[place - 1]
    right = shown.copy()
    right[0, [19, 20]] |= MARK
    assert score(own, right)[0] == 1
    halves = right.copy()
    halves[0, 5] |= MARK
    assert score(own, halves)[0] == 0.5
    wrong = right.copy()
    wrong[0, 20] = MARK | (wrong[0, 20] % MARK % 2 + 1)
    assert score(own, wrong)[0] == 0


def test_inside_a_restored_layer_at_0_gains_are_strengths_and_at_1_they_fall():
    found = [
        inside(with_restoration(model(), layers=[0], restoration=restoration), shown, 0, "float32")
        for restoration, shown in ((0.0, rows(2)), (1.0, rows(2)))
    ]
    reset, exact = (one["0"] for one in found)
    np.testing.assert_allclose(reset["gain"], reset["strength"], rtol=1e-3)
    np.testing.assert_array_less(exact["gain"], exact["strength"])
    assert exact["restoration"] == [1.0, 1.0]


def test_another_librarys_delta_rule_is_ours_with_its_gradients():
    """In bfloat16, documents and states included; on a CPU its kernels' plain form runs."""
    pytest.importorskip("jla")
    rng = np.random.default_rng(0)
    heads, time, width = 2, 70, 64

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def head():
        key = normal(time, width)
        return Stream(
            key / jnp.linalg.norm(key, axis=-1, keepdims=True),
            normal(time, width),
            normal(time, width),
            jnp.asarray(rng.uniform(0.1, 2, time), jnp.float32),
            -jnp.asarray(rng.uniform(0, 0.2, time), jnp.float32),
            starts=jnp.zeros(time, bool).at[40].set(True),
        )

    stream = jax.tree.map(lambda *parts: jnp.stack(parts), *(head() for _ in range(heads)))

    def in_half(stream):
        vectors = (part.astype(jnp.bfloat16) for part in (stream.key, stream.value, stream.query))
        return replace(stream, **dict(zip(("key", "value", "query"), vectors, strict=True)))

    half = jax.vmap(in_half)(stream)
    initial, weights = normal(heads, width, width), normal(heads, time, width)

    def ours(stream, mean):
        last, found = filter_scan(stream, 1.0, Reset(), initial=Belief(mean, None), backend="xla")
        return found.mean, last.mean

    def theirs(stream, mean):
        return delta_rule(stream, mean, 1.0)

    def differentiated(scan, stream):
        floats, rest = eqx.partition(stream, eqx.is_inexact_array)

        def total(floats, mean):
            outputs, last = jax.vmap(scan)(eqx.combine(floats, rest), mean)
            return jnp.sum(outputs * weights) + jnp.sum(last * initial), (outputs, last)

        return eqx.filter_jit(jax.grad(total, argnums=(0, 1), has_aux=True))(floats, initial)

    pairs = zip(
        jax.tree.leaves(differentiated(ours, stream)),
        jax.tree.leaves(differentiated(theirs, half)),
        strict=True,
    )
    for expected, found in pairs:
        apart = jnp.linalg.norm(expected - found.astype(jnp.float32))
        assert apart < 1e-2 * jnp.linalg.norm(expected)


TINY = shlex.split("--length 64 --needles 0 --batch 2 --float32 --devices 1")


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def test_a_teacher_is_trained_stopped_and_gone_on_with_then_distilled(text, tmp_path, capsys):
    """The whole way by commands; stopped at once, it goes on with the same losses."""
    sizes = shlex.split(
        "--vocabulary 300 --d-model 8 --depth 1 --heads 1 --key-width 4 --value-width 4"
    )
    pretrain = ["pretrain", text, *TINY, *sizes, "--cache", tmp_path / "cache", "--tokens", 256]
    teacher, stopped = tmp_path / "teacher", tmp_path / "stopped"
    assert run(*pretrain, "--out", stopped, "--minutes", 1e-9) == 0
    assert "--resume goes on" in capsys.readouterr().out
    assert run("pretrain", "--out", stopped, "--resume", "--devices", 1) == 0
    assert run(*pretrain, "--out", teacher) == 0
    losses = [
        json.loads((one / "record.json").read_text())["metrics"]["curve"]["loss"]
        for one in (teacher, stopped)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
    assert run(*pretrain, "--out", teacher) == 2  # it holds a run
    assert read_checkpoint(teacher / "model").configuration.d_model == 8
    assert run("convert", teacher / "model") == 0

    capsys.readouterr()
    tell(text, tmp_path, teacher / "model", "--control")
    assert "control after" in capsys.readouterr().out


def tell(text: Path, folder: Path, teacher: Path, *options: str) -> None:
    """Distil, and look at what is left."""
    student = folder / "student"
    distil = ["distill", teacher, "--text", text, *TINY, "--cache", folder / "cache"]
    assert run(*distil, *options, "--matching", 1, "--steps", 1, "--out", student) == 0
    metrics = json.loads((student / "record.json").read_text())["metrics"]
    for name in ("teacher", "before", "after"):
        assert metrics[name]["perplexity"] > 1
    assert metrics["device_seconds"] > 0
    learned = restorations(read_checkpoint(student / "model").model)
    inside = metrics["after"]["inside"]
    assert {str(layer) for layer in learned} == set(inside)
    for layer, dial in learned.items():
        np.testing.assert_allclose(dial, inside[str(layer)]["restoration"], rtol=1e-5)


def small_teacher(folder: Path) -> Path:
    """A checkpoint folder of drawn weights, with a vocabulary."""
    settings = {**SMALL, "vocab_size": VOCABULARY.get_vocab_size(), "num_hidden_layers": 1}
    VOCABULARY.save(str(checkpoint(folder / "teacher", settings) / "tokenizer.json"))
    return folder / "teacher"


@pytest.mark.exhaustive
def test_bayesian_layers_are_distilled_and_read_again(text, tmp_path, capsys):
    teacher = small_teacher(tmp_path)
    tell(text, tmp_path, teacher)
    assert "inside restored layers" in capsys.readouterr().out
    again = tmp_path / "student" / "model"
    assert run("distill", again, "--text", text, *TINY, "--out", tmp_path / "no") == 2
    assert "name its teacher" in capsys.readouterr().err


def test_a_layer_that_is_not_there_is_refused_before_a_folder_is_made(text, tmp_path, capsys):
    teacher = small_teacher(tmp_path)
    wrong = ["distill", teacher, "--text", text, *TINY, "--out", tmp_path / "none"]
    assert run(*wrong, "--layers", 5) == 2
    assert "`layers` holds 5" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
