"""The `mbd` command: what it says, what it writes, and how it ends.

Exit codes: 0 success, 1 a check failed or the model is refused, 2 a wrong request. A wrong request
is answered in one line that says what is wrong.
"""

import json
import re
import shlex
import sys
from types import SimpleNamespace

import pytest

from design_models import CATALOGUE
from inference import update_check
from recall import cli, new_model, reports, verification
from recall.cli import main

COMMANDS = ("models", "verify", "new", "recall", "collide", "predict", "convert", "bench")


@pytest.fixture(autouse=True)
def _user_files(monkeypatch):
    """Files of a test leave nothing on the path for the next."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def write(tmp_path):
    """Write a user's file; return its path as words of a command."""

    def write(text: str, name: str = "mine.py") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def wrong_request(capsys, *arguments: str) -> str:
    """The one line on standard error that answers a wrong request."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    assert said.err.startswith(f"mbd {arguments[0]}: ")
    return said.err


# -- help, models, new ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_holds_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert re.search(rf"example: mbd {command}\b", said)
    assert "--json FILE" in said


def test_the_examples_in_the_help_are_requests_that_are_understood(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        examples = capsys.readouterr().out.partition("example: ")[2]
        for example in examples.splitlines():
            assert cli._parser().parse_args(shlex.split(example)[1:]).name == command


@pytest.mark.parametrize("arguments", [[], ["prove"], ["verify", "--seed", "-1"], ["new"]])
def test_a_command_line_that_is_none_is_answered_in_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "--help" in said.err


def test_models_lists_the_catalogue(tmp_path, capsys):
    assert main(["models", "--json", str(tmp_path / "models.json")]) == 0
    said = capsys.readouterr()
    record = json.loads((tmp_path / "models.json").read_text())
    assert said.err == ""
    assert [entry["name"] for entry in record] == list(CATALOGUE)
    for name, entry in CATALOGUE.items():
        assert name in said.out
        assert entry.paper.split(",")[0].split(" (")[0] in said.out
    policies = {entry["name"]: entry["policy"] for entry in record}
    assert policies["deltanet"] == "reset"
    assert policies["bayesian_layer"] == "exact"


def test_new_says_how_to_verify_what_it_wrote(tmp_path, capsys):
    path = tmp_path / "my memory.py"
    assert main(["new", str(path)]) == 0
    said = capsys.readouterr()
    command = said.out.partition("verify it: ")[2]
    assert shlex.split(command) == ["mbd", "verify", f"{path}:model"]
    assert path.read_text().startswith('"""A memory of my own')


def test_new_overwrites_nothing(write, capsys):
    path = write("mine = 1\n")
    assert f"{path} is there already" in wrong_request(capsys, "new", path)
    with open(path) as file:
        assert file.read() == "mine = 1\n"


@pytest.mark.parametrize(
    ("name", "says"),
    [("mine.txt", "does not end in .py"), ("nowhere/mine.py", "there is no folder")],
)
def test_new_refuses_a_name_it_cannot_write(name, says, tmp_path, capsys):
    assert says in wrong_request(capsys, "new", str(tmp_path / name))


# -- a verification ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The file that `mbd new` writes, with a wrong update beside the right one."""
    path = tmp_path_factory.mktemp("started") / "my_memory.py"
    new_model.write_new_model(path)
    wrong = "\n\ndef wrong_update(mean, covariance, u):\n    return mean, covariance\n"
    path.write_text(path.read_text() + wrong)
    return path


@pytest.fixture(scope="module")
def verify_once():
    """Verification, once for each model: what is said of updates comes after it."""
    verify = verification.verify_subject
    done = {}

    def once(subject, **options):
        if subject.name not in done:
            done[subject.name] = verify(subject, **options)
        return done[subject.name]

    return once


@pytest.fixture
def shared(verify_once, monkeypatch):
    monkeypatch.setattr(verification, "verify_subject", verify_once)


@pytest.mark.nuts
@pytest.mark.slow
@pytest.mark.usefixtures("shared")
@pytest.mark.xdist_group("kin")
def test_the_model_that_new_writes_verifies_as_it_stands(started, tmp_path, capsys):
    assert main(["verify", f"{started}:model", "--json", str(tmp_path / "record.json")]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    for part in (
        "Linear-Gaussian: proved",
        "Structure: ",
        "derived update",
        "joint conditioning",
        "simulation",
        "NUTS",
        "In the catalogue: ",
        "bayesian_layer",
        "Compiled paths: token",
        "Compiled layers run as: Pallas kernels on Hopper GPUs",
        "verified in",
    ):
        assert part in said.out
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["holds"] is True
    assert record["name"] == f"{started}:model"
    assert record["structure"]["kind"] == "shared rows"
    assert {check["oracle"] for check in record["checks"]} >= {"NUTS", "simulation"}
    for check in record["checks"]:
        assert check["holds"]
        assert {"quantity", "statistic", "threshold", "unit"} <= set(check)
        assert check["quantity"] in said.out
    for equation in record["update"]:
        assert equation.strip() in said.out


@pytest.mark.nuts
@pytest.mark.slow
@pytest.mark.usefixtures("shared")
def test_the_update_that_new_writes_is_exact(started, tmp_path, capsys):
    request = ["verify", f"{started}:model", "--update", f"{started}:my_update"]
    assert main([*request, "--json", str(tmp_path / "record.json")]) == 0
    said = capsys.readouterr().out
    assert f"{started}:my_update: exact: over" in said
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["holds"] is True
    assert record["update_check"]["exact"] is True
    assert record["update_check"]["worst"] < 1e-9
    assert record["update_check"]["words"] in said


@pytest.mark.nuts
@pytest.mark.slow
@pytest.mark.usefixtures("shared")
def test_a_wrong_update_fails_with_its_step_and_quantity(started, tmp_path, capsys):
    request = ["verify", f"{started}:model", "--update", f"{started}:wrong_update"]
    assert main([*request, "--json", str(tmp_path / "record.json")]) == 1
    said = capsys.readouterr().out
    assert f"{started}:wrong_update: not exact: the mean departs at step 1" in said
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["holds"] is False
    assert record["update_check"]["step"] == 1
    assert record["update_check"]["quantity"] == "mean"
    assert record["update_check"]["standard_errors"] > 10 > record["update_check"]["reference"]


@pytest.mark.usefixtures("shared")
@pytest.mark.nuts
@pytest.mark.slow
@pytest.mark.parametrize(
    ("update", "says"),
    [
        ("none_such", "holds no `none_such`"),
        ("model", "is of type DesignModel; it must be a function"),
        ("memory", "it must take (mean, covariance, u)"),
    ],
)
def test_an_update_that_is_none_is_refused_beforehand(update, says, started, capsys):
    request = ("verify", f"{started}:model", "--update", f"{started}:{update}")
    assert says in wrong_request(capsys, *request)


WHOLE_MODEL = """
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan


def walk(key, value):
    def step(memory, u):
        key, value = u
        memory = numpyro.sample("memory", dist.Normal({mean}, 0.5).to_event(2))
        numpyro.sample("value", dist.{noise}(memory @ key, 1.0).to_event(1), obs=value)
        return memory, memory @ key

    first = numpyro.sample("first", dist.Normal(jnp.zeros((3, 2)), 1.0).to_event(2))
    return scan(step, first, (key, value))
"""


@pytest.mark.exhaustive  # whole models have tests of their own, and the command verifies others
@pytest.mark.nuts
@pytest.mark.slow
@pytest.mark.xdist_group("kin")
def test_a_whole_numpyro_model_verifies_by_its_name(write, capsys):
    path = write(WHOLE_MODEL.format(mean="0.9 * memory", noise="Normal"))
    code = main(["verify", f"{path}:walk"])
    said = capsys.readouterr()
    assert (code, said.err) == (0, "")
    assert f"{path}:walk" in said.out
    assert "verified in" in said.out


# -- refusals ------------------------------------------------------------------------------------

MODEL = """
import sys

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from design_models import DesignModel


def prior():
    return numpyro.sample("memory", dist.Normal(jnp.zeros((3, 2)), 1.0).to_event(2))


def transition(memory, u):
    {transition}


def observe(memory, u):
    {observe}
    numpyro.sample("value", dist.Normal({read}, 0.5).to_event(1), obs=u["value"])


model = DesignModel(prior, transition, observe{inputs})
"""


def model_file(transition="return memory", observe="", read='memory @ u["key"]', inputs="") -> str:
    return MODEL.format(transition=transition, observe=observe, read=read, inputs=inputs)


NOT_GAUSSIAN = model_file(read='jnp.tanh(memory @ u["key"])')


def line_of(text: str, part: str) -> int:
    return next(n for n, line in enumerate(text.splitlines(), 1) if part in line)


def test_a_model_that_is_not_linear_gaussian_is_refused_with_its_place(write, tmp_path, capsys):
    path = write(NOT_GAUSSIAN)
    assert main(["verify", f"{path}:model", "--json", str(tmp_path / "record.json")]) == 1
    said = capsys.readouterr()
    assert said.err == ""
    record = json.loads((tmp_path / "record.json").read_text())
    line = line_of(NOT_GAUSSIAN, "jnp.tanh")
    refused = record["refused"]
    assert record["holds"] is False
    assert (refused["function"], refused["site"]) == ("observe", "value")
    assert (refused["file"], refused["line"]) == (path, line)
    assert "tanh" in refused["reason"]
    assert f"{path}:model: refused" in said.out
    assert f"`observe`, site 'value': {refused['reason']}" in said.out
    assert f"{path}:{line}" in said.out


def test_a_whole_model_that_is_not_linear_gaussian_is_refused_with_its_place(
    write, tmp_path, capsys
):
    text = WHOLE_MODEL.format(mean="memory", noise="Cauchy")
    path = write(text)
    assert main(["verify", f"{path}:walk", "--json", str(tmp_path / "record.json")]) == 1
    refused = json.loads((tmp_path / "record.json").read_text())["refused"]
    assert refused["site"] == "value"
    assert "Cauchy" in refused["reason"]
    assert (refused["file"], refused["line"]) == (path, line_of(text, "Cauchy"))
    assert "Cauchy" in capsys.readouterr().out


def test_of_several_models_every_refusal_is_reported(write, tmp_path, capsys):
    first, second = write(NOT_GAUSSIAN), write(NOT_GAUSSIAN.replace("tanh", "sin"), "other.py")
    request = ["verify", f"{first}:model", f"{second}:model"]
    assert main([*request, "--json", str(tmp_path / "record.json")]) == 1
    record = json.loads((tmp_path / "record.json").read_text())
    assert [entry["refused"]["file"] for entry in record] == [first, second]
    assert capsys.readouterr().out.count("refused") == 2


# -- wrong requests ------------------------------------------------------------------------------

NAN_INPUTS = model_file(
    inputs=", inputs=lambda rng, steps: {'key': jnp.full((steps, 2), jnp.nan), "
    "'value': jnp.zeros((steps, 3))}"
)
SHORT_INPUTS = model_file(inputs=", inputs=lambda rng, steps: {'key': jnp.ones((1, 2))}")

WRONG = {
    "missing name": (model_file(), "modle", "holds no `modle`; did you mean model?"),
    "no name": (model_file(), None, "needs a name, as in"),
    "wrong object": ("model = 3\n", "model", "is of type int; it must be a DesignModel"),
    "class": ("class model: pass\n", "model", "is of type type"),
    "syntax error": ("x = 1\ndef prior(:\n", "model", "mine.py:2 is not valid Python"),
    "raising file": ("x = 1\nx / 0\n", "model", "ZeroDivisionError: division by zero"),
    "missing import": ("import none_such_module\n", "model", "No module named 'none_such_module'"),
    "sys.exit in file": ("import sys\nsys.exit(3)\n", "model", "called sys.exit(3)"),
    "NaN inputs": (NAN_INPUTS, "model", 'input "key"'),
    "short inputs": (SHORT_INPUTS, "model", 'input "key" has shape (1, 2)'),
    "other inputs": (
        model_file(transition='return memory * u["gate"]'),
        "model",
        'reads u["gate"], which has no default',
    ),
    "raising model": (
        model_file(observe='raise RuntimeError("out of\\n    cheese")'.replace("\n", "\\n")),
        "model",
        "RuntimeError: out of cheese",
    ),
    "sys.exit in model": (model_file(transition="sys.exit(4)"), "model", "called sys.exit(4)"),
    "wrong arguments": (
        model_file().replace("def observe(memory, u)", "def observe(memory)"),
        "model",
        "it must take (memory, u)",
    ),
    "whole model without inputs": ("def model(): pass\n", "model", "takes nothing"),
    "whole model without a scan": ("def model(value): pass\n", "model", "whole NumPyro model"),
}


@pytest.mark.parametrize(("text", "name", "says"), WRONG.values(), ids=WRONG)
def test_a_file_that_cannot_be_used_is_answered_in_one_line(text, name, says, write, capsys):
    path = write(text)
    request = path if name is None else f"{path}:{name}"
    said = wrong_request(capsys, "verify", request)
    assert says in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ("none.py:model", "there is no file none.py"),
        ("bayesian_layr", "did you mean bayesian_layer"),
        ("folder/model", "names no Python file"),
    ],
)
def test_a_name_of_nothing_is_answered_in_one_line(request_, says, capsys):
    assert says in wrong_request(capsys, "verify", request_)


def test_of_several_models_an_error_names_the_one_it_is_about(write, capsys):
    good, bad = write(NOT_GAUSSIAN), write(NAN_INPUTS, "bad.py")
    assert main(["verify", f"{good}:model", f"{bad}:model"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"mbd verify: {bad}:model: ")
    assert said.count("\n") == 1


def test_an_update_of_several_models_is_refused(write, capsys):
    path = write(
        model_file() + "\n\ndef update(mean, covariance, u):\n    return mean, covariance\n"
    )
    request = ("verify", "deltanet", "retnet", "--update", f"{path}:update")
    assert "`--update` checks one model" in wrong_request(capsys, *request)


def test_debug_shows_the_traceback(write, capsys):
    path = write(WRONG["raising file"][0])
    assert main(["verify", f"{path}:model", "--debug"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.splitlines()[-1].startswith("mbd verify: ")


@pytest.mark.parametrize("name", ["", "nowhere/record.json"])
def test_a_record_that_cannot_be_written_is_found_out_before_the_work(name, tmp_path, capsys):
    said = wrong_request(capsys, "verify", "bayesian_layer", "--json", str(tmp_path / name))
    assert "`--json` is" in said
    assert "name a file in a folder that exists" in said


def test_a_wrong_request_leaves_no_record(tmp_path, capsys):
    record = tmp_path / "record.json"
    wrong_request(capsys, "verify", "none.py:model", "--json", str(record))
    assert not record.exists()


def test_an_update_of_a_reduction_is_compared_with_the_exact_filter_in_words(
    started, tmp_path, monkeypatch, capsys
):
    record = {"name": "deltanet", "holds": True, "policy": {"name": "reset"}}
    outcome = verification.Outcome("deltanet", record), SimpleNamespace(exact_filter=None)
    monkeypatch.setattr(verification, "verify_subject", lambda subject, **options: outcome)
    monkeypatch.setattr(reports, "print_outcome", lambda console, outcome: None)
    monkeypatch.setattr(
        update_check,
        "check_update",
        lambda exact, update, seed: update_check.UpdateVerdict(
            False, 1.0, 2, "mean", 0.5, 9.0, 1.0
        ),
    )
    request = ["verify", "deltanet", "--update", f"{started}:my_update"]
    assert main([*request, "--json", str(tmp_path / "record.json")]) == 1
    said = capsys.readouterr().out
    compared = json.loads((tmp_path / "record.json").read_text())["update_check"]["compared_with"]
    assert f"Compared with {compared}." in said
    assert "the exact filter of the design model of deltanet, not with deltanet itself" in compared
    assert "reduction by reset" in compared
