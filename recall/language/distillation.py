"""Bayesian Layers distilled into a trained Gated DeltaNet, and the control that has none.

Both read the same rows in the same order, in as many steps, with the same optimiser and rates; the
control goes on training the teacher itself.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from design_models import ModelError
from layers import parameter_count
from recall.checkpoints.folder import Checkpoint, read_checkpoint
from recall.checkpoints.surgery import restorations, with_restoration
from recall.records import record, write_json
from recall.text.corpus import Mixture, corpus_at
from recall.text.vocabulary import read_vocabulary

from .forward import Compute
from .inside import inside
from .objectives import on_layers, on_teacher
from .pretraining import Show, Stage, curve, held_out
from .run_files import RunFiles
from .training import Descent, Run, lately, make_step, mesh_of, spent, started, train

_LOOKED_INTO = 8
"""Rows of held-out prose on which layers are looked into."""


@dataclass(frozen=True)
class Distillation:
    """What is distilled into what, on what.

    Args:
        teacher: folder of a checkpoint.
        texts: files to train on.
        valid: files that are held out.
        cache: folder of tokens.
        layers: blocks that get Bayesian Layers; None for all.
        heads: of each of them; None for all.
        restoration: λ to begin with.
        learned: whether λ learns, once layers are matched.
        control: whether nothing is restored.
        matching: steps that match the teacher's layers.
        steps: after these, towards the teacher's answers and the text.
        task: share of the loss on the text itself.
        answers: weight of tokens that answer a question.
        batch: rows of a step.
        rate: of weights, at the most.
        dial_rate: of λ's logit, log σ² and drift.
        mixture: of prose and needle texts.
        seed: of batches.
        compute: dtype of the sequence.
        lean: whether blocks are computed again for gradients, which takes less memory.
    """

    teacher: str
    texts: tuple[str, ...]
    valid: tuple[str, ...]
    cache: str
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    restoration: float = 0.9
    learned: bool = True
    control: bool = False
    matching: int = 100
    steps: int = 400
    task: float = 0.5
    answers: float = 5.0
    batch: int = 32
    rate: float = 3e-4
    dial_rate: float = 2e-2
    mixture: Mixture = field(default_factory=Mixture)
    seed: int = 0
    compute: Compute = "bfloat16"
    lean: bool = False


def distillation_of(data: Mapping[str, Any]) -> Distillation:
    """Make a plan from plain data."""
    parts = dict(data)
    parts["mixture"] = Mixture(**parts["mixture"])
    for name in ("texts", "valid", "layers", "heads"):
        parts[name] = None if parts[name] is None else tuple(parts[name])
    return Distillation(**parts)


def begun(plan: Distillation) -> tuple[Checkpoint, Checkpoint]:
    """The teacher, and the student before its first step.

    Raises:
        ModelError: the folder holds no teacher, or the layers or heads are not there.
    """
    teacher = read_checkpoint(Path(plan.teacher))
    if restorations(teacher.model):
        raise ModelError(f"`FOLDER` is {plan.teacher}, which is restored; name its teacher.")
    if plan.control:
        return teacher, teacher
    try:
        model = with_restoration(
            teacher.model,
            layers=plan.layers,
            heads=plan.heads,
            restoration=plan.restoration,
            learned=plan.learned,
        )
    except ValueError as error:
        raise ModelError(str(error)) from error
    return teacher, replace(teacher, model=model)


def distill(
    folder: Path,
    plan: Distillation,
    *,
    devices: int,
    show: Show = lambda step, steps, words: None,
    stage: Stage = lambda name: None,
    command: str = "",
    deadline: float = math.inf,
) -> dict[str, Any] | None:
    """Distil to the end, from the last checkpoint on; write the student and a record.

    Args:
        folder: of the run, which holds its plan.
        plan: what is distilled into what.
        devices: that share the rows of a batch.
        show: told of each step.
        stage: told what else is being done.
        command: that makes the record again.
        deadline: `time.perf_counter()` at which training stops with a checkpoint.

    Returns:
        The record; None where the deadline came first.
    """
    files, began = RunFiles(folder), time.perf_counter()
    stage("reading the teacher")
    teacher, student = begun(plan)
    tokenizer = read_vocabulary(Path(plan.teacher) / "tokenizer.json")
    words, size = tokenizer.get_vocab_size(), teacher.configuration.vocabulary
    if words > size:
        raise ModelError(f"tokenizer.json has {words} tokens, and the model {size}.")
    corpus = corpus_at(plan.cache, tokenizer, plan.texts, plan.valid, plan.mixture, stage)
    mesh, steps = mesh_of(devices), plan.matching + plan.steps
    training = started(student.model)
    descent = Descent(plan.rate, plan.dial_rate, steps, max(1, steps // 20))
    towards = on_teacher(
        corpus.end, plan.compute, task=plan.task, answers=plan.answers, lean=plan.lean
    )
    step = make_step(towards, descent, training, teacher.model, mesh)
    matching = step
    restored = tuple(restorations(student.model))
    if restored:
        layers = on_layers(corpus.end, plan.compute, restored)
        matching = make_step(layers, descent, training, teacher.model, mesh)
    run = Run(files, steps, plan.batch * plan.mixture.length, devices, show, deadline)
    training, history, done = train(
        run,
        training,
        lambda number: matching if number < plan.matching else step,
        lambda number: corpus.batch(plan.batch, plan.seed, number),
    )
    if not done:
        return None
    stage("testing")
    looked = corpus.held_out[:_LOOKED_INTO]

    def scored(model: Any) -> dict[str, Any]:
        return {
            **held_out(model, corpus, devices, plan.compute),
            "inside": inside(model, looked, corpus.end, plan.compute),
        }

    metrics = {
        "parameters": parameter_count(training.model),
        "restored_layers": list(restored),
        **spent(run, history),
        "final_loss": lately(history, "loss"),
        "teacher": held_out(teacher.model, corpus, devices, plan.compute),
        "before": scored(student.model),
        "after": scored(training.model),
        "curve": curve(history),
    }
    stage("writing the student")
    files.write_model(replace(student, model=training.model))
    found = record(
        asdict(plan), metrics, command=command, seed=plan.seed, seconds=time.perf_counter() - began
    )
    write_json(files.record_file, found)
    return found
