"""The guide "Add a study", followed: its file in a directory of its own is found by all commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "add_a_study.md"
# Each command in one process, with what it printed and its exit code; then the step that `bnjax compile` compiles.
SCRIPT = """
import contextlib, io, json, sys
import jax
jax.config.update("jax_platforms", "cpu")
from bnjax import training
from bnjax.studies.cli.main import main
said = {}
for command in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            code = main(command.split())
        except SystemExit as stop:
            code = stop.code
    said[command.split(" --")[0]] = [code, out.getvalue()]
from bnjax.studies.engine import steps
step, arguments = steps.abstract_step(steps.network_of("quadrants"), training.make_mesh(), parallel_by="shard_map")
said["step"] = [0, str(jax.eval_shape(step, *arguments)[0].batch_stats)]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """Returns the output of the commands once the guide's file was there, and the directory of their results."""
    directory = tmp_path_factory.mktemp("studies")
    (directory / "quadrants.py").write_text(GUIDE.read_text().split("```py\n")[1].split("```")[0])
    runs = directory / "runs"
    commands = [
        "list",
        "run quadrants --seeds 2 --epochs 3 --width 4 --quiet --checkpoint-every 0 --out " + str(runs / "quadrants"),
        "claims --study quadrants --seeds 2 --quiet --out " + str(runs),
        f"report {runs}",
        "compile --help",
        "run --help",
    ]
    command = [sys.executable, "-c", SCRIPT, *commands]
    done = subprocess.run(
        command, env={**os.environ, "BNJAX_STUDIES": str(directory)}, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1]), runs


def test_the_commands_know_the_study(followed):
    said, runs = followed
    assert all(code == 0 for code, _ in said.values()), said
    assert "points of opposite quadrants" in said["list"][1] and "8 seeds, epochs: 20" in said["list"][1]
    assert "quadrants" in said["run"][1] and "circles" in said["run"][1]
    assert "quadrants" in said["compile"][1] and "resnet50" in said["compile"][1]
    assert "1 study" in said[f"report {runs}"][1]


def test_its_results_and_claims_are_saved(followed):
    said, runs = followed
    document = json.loads((runs / "quadrants" / "results.json").read_text())
    assert document["command"] == "bnjax run quadrants --seeds 2 --epochs 3 --width 4"
    assert list(document["variants"]) == ["none", "bn"]
    assert document["variants"]["bn"]["parameters"]["batch_stats"]["BatchNorm_0/mean"] == [4]
    assert [(claim["id"], claim["measured"]) for claim in document["claims"]] == [("Q.1", "needs epochs 20")]
    with np.load(runs / "quadrants" / "curves.npz") as curves:
        assert curves["bn/test_accuracy"].shape == (2, 3)
        assert curves["bn/histograms/gradient/Dense_0/kernel/counts"].shape == (3, 40)
    ledger = json.loads((runs / "ledger.json").read_text())
    assert [claim["id"] for claim in ledger["claims"]] == ["Q.1"]
    assert "Q.1" in said["claims"][1] and "needs epochs 20" in said["claims"][1]
    assert (runs / "quadrants" / "checkpoints").is_dir()
    assert "mean" in said["step"][1]


def test_help_shows_its_options_without_importing_it(tmp_path):
    text = GUIDE.read_text().split("```py\n")[1].split("```")[0]
    (tmp_path / "quadrants.py").write_text(text + "\nraise RuntimeError('imported')\n")
    command = [sys.executable, "-m", "bnjax", "run", "quadrants", "--help"]
    said = subprocess.run(
        command, env={**os.environ, "BNJAX_STUDIES": str(tmp_path)}, check=True, capture_output=True, text=True
    ).stdout
    assert "--width N" in said and "hidden units (default 16)" in said and "number of seeds (default 8)" in said


def test_a_declaration_that_needs_the_rest_of_its_file_says_so(tmp_path):
    options = "class Options(studies.Options):\n    epochs: int = option(EPOCHS, '')\n"
    (tmp_path / "a.py").write_text(f"EPOCHS = 3\n{options}\nSTUDY = Study('a', '', '')\n")
    command = [sys.executable, "-m", "bnjax", "list"]
    done = subprocess.run(command, env={**os.environ, "BNJAX_STUDIES": str(tmp_path)}, capture_output=True, text=True)
    assert "Options and STUDY are read without the rest of the file" in done.stderr and "EPOCHS" in done.stderr
