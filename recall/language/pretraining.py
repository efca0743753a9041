"""A Gated DeltaNet trained from nothing on text, and left as a checkpoint folder."""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from layers import LanguageModel, parameter_count
from recall.checkpoints import names
from recall.checkpoints.configuration import Configuration, configuration_of
from recall.checkpoints.folder import WEIGHTS, Checkpoint, WeightFile
from recall.checkpoints.model import initial_model
from recall.records import record, write_json
from recall.text.corpus import Corpus, Mixture, corpus_at
from recall.text.documents import read_documents
from recall.text.vocabulary import read_vocabulary, train_vocabulary

from .forward import Compute
from .objectives import on_text
from .run_files import RunFiles
from .scores import loss_of, prose_scorer, retrieval_scorer
from .training import Descent, Run, lately, make_step, mesh_of, spent, started, train

MOST_HELD_OUT = 256
"""Rows of held-out prose that are scored."""

Stage = Callable[[str], None]
Show = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Sizes:
    """Of a Gated DeltaNet; the feed-forward layers are as wide as flash-linear-attention's."""

    vocabulary: int = 4096
    d_model: int = 768
    depth: int = 7
    heads: int = 6
    key_width: int = 64
    value_width: int = 128

    def settings(self) -> dict[str, Any]:
        """A config.json."""
        return {
            "architectures": ["GatedDeltaNetForCausalLM"],
            "model_type": "gated_deltanet",
            "vocab_size": self.vocabulary,
            "hidden_size": self.d_model,
            "num_hidden_layers": self.depth,
            "num_heads": self.heads,
            "head_dim": self.key_width,
            "expand_v": self.value_width / self.key_width,
            "hidden_ratio": 4,
            "use_gate": True,
            "use_short_conv": True,
            "conv_size": 4,
            "norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }


@dataclass(frozen=True)
class Pretraining:
    """What is trained on what.

    Args:
        texts: files to train on.
        valid: files that are held out.
        cache: folder of tokens.
        sizes: of the model.
        mixture: of prose and needle texts.
        batch: rows of a step.
        tokens: read in all.
        rate: learning rate at the most.
        weight_decay: of matrices.
        answers: weight of tokens that answer a question, beside 1 of all others.
        seed: of weights and batches.
        compute: dtype of the sequence.
    """

    texts: tuple[str, ...]
    valid: tuple[str, ...]
    cache: str
    sizes: Sizes = Sizes()
    mixture: Mixture = field(default_factory=Mixture)
    batch: int = 64
    tokens: int = 200_000_000
    rate: float = 2e-3
    weight_decay: float = 0.1
    answers: float = 5.0
    seed: int = 0
    compute: Compute = "bfloat16"

    @property
    def steps(self) -> int:
        return max(1, math.ceil(self.tokens / (self.batch * self.mixture.length)))


def pretraining_of(data: Mapping[str, Any]) -> Pretraining:
    """Make a plan from plain data."""
    parts = dict(data)
    parts["sizes"] = Sizes(**parts["sizes"])
    parts["mixture"] = Mixture(**parts["mixture"])
    for name in ("texts", "valid"):
        parts[name] = tuple(parts[name])
    return Pretraining(**parts)


def pretrain(
    folder: Path,
    plan: Pretraining,
    *,
    devices: int,
    show: Show = lambda step, steps, words: None,
    stage: Stage = lambda name: None,
    command: str = "",
    deadline: float = math.inf,
) -> dict[str, Any] | None:
    """Train to the end, from the last checkpoint on; write the model and a record.

    Args:
        folder: of the run, which holds its plan.
        plan: what is trained on what.
        devices: that share the rows of a batch.
        show: told of each step.
        stage: told what else is being done.
        command: that makes the record again.
        deadline: `time.perf_counter()` at which training stops with a checkpoint.

    Returns:
        The record; None where the deadline came first.
    """
    files, began = RunFiles(folder), time.perf_counter()
    vocabulary = folder / "tokenizer.json"
    if not vocabulary.is_file():
        stage("making a vocabulary")
        texts = read_documents([Path(text) for text in plan.texts])
        train_vocabulary(texts, plan.sizes.vocabulary).save(str(vocabulary))
    tokenizer = read_vocabulary(vocabulary)
    corpus = corpus_at(plan.cache, tokenizer, plan.texts, plan.valid, plan.mixture, stage)
    settings = plan.sizes.settings() | {"bos_token_id": corpus.end, "eos_token_id": corpus.end}
    configuration, mesh = configuration_of(settings), mesh_of(devices)
    training = started(initial_model(configuration, jax.random.key(plan.seed)))
    warmup = min(200, max(1, plan.steps // 10))
    descent = Descent(plan.rate, plan.rate, plan.steps, warmup, plan.weight_decay)
    objective = on_text(corpus.end, plan.compute, answers=plan.answers)
    step = make_step(objective, descent, training, None, mesh)
    run = Run(files, plan.steps, plan.batch * plan.mixture.length, devices, show, deadline)
    training, history, done = train(
        run,
        training,
        lambda number: step,
        lambda number: corpus.batch(plan.batch, plan.seed, number),
    )
    if not done:
        return None
    stage("testing")
    metrics = {
        "parameters": parameter_count(training.model),
        "final_loss": lately(history, "loss"),
        **spent(run, history),
        "held_out": held_out(training.model, corpus, devices, plan.compute),
        "curve": curve(history),
    }
    stage("writing the model")
    files.write_model(_checkpoint(training.model, configuration, settings, vocabulary))
    found = record(
        asdict(plan), metrics, command=command, seed=plan.seed, seconds=time.perf_counter() - began
    )
    write_json(files.record_file, found)
    return found


def held_out(
    model: LanguageModel, corpus: Corpus, devices: int, compute: Compute
) -> dict[str, float]:
    """Perplexity on unseen prose, and the share of unseen needles found; nan where none is."""
    mesh = mesh_of(devices)
    loss = loss_of(prose_scorer(corpus.end, mesh, compute)(model, corpus.held_out[:MOST_HELD_OUT]))
    retrieved = math.nan
    if len(corpus.held_out_needles):
        found = retrieval_scorer(corpus.end, mesh, compute)(model, corpus.held_out_needles)
        retrieved = float(np.mean(found))
    return {
        "loss": loss.mean,
        "loss_error": loss.error,
        "perplexity": loss.perplexity,
        "retrieved": retrieved,
    }


def curve(history: Mapping[str, Any], points: int = 100) -> dict[str, list[list[int | float]]]:
    """What was told on the way, thinned."""
    return {name: told[:: max(1, len(told) // points)] for name, told in history["told"].items()}


def _checkpoint(
    model: LanguageModel,
    configuration: Configuration,
    settings: Mapping[str, Any],
    vocabulary: Path,
) -> Checkpoint:
    """As flash-linear-attention would write it, float32."""
    weights = WeightFile(
        WEIGHTS, {"format": "pt"}, dict.fromkeys(names.shapes(configuration), np.float32)
    )
    beside = {
        "config.json": (json.dumps(settings, indent=2) + "\n").encode(),
        "tokenizer.json": vocabulary.read_bytes(),
    }
    return Checkpoint(configuration, model, (weights,), beside)
