import json
import subprocess
import sys

import pytest

from bnjax.studies import circles
from bnjax.studies.cli import console
from bnjax.studies.cli.main import main


def test_list_and_help(capsys):
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("circles", "blobs", "mnist", "bnjax run STUDY"))
    assert main([]) == 0
    assert "run a study" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("bnjax ")
    with pytest.raises(SystemExit, match="0"):
        main(["run", "mnist", "--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in ("--seeds", "--epochs", "--out", "--quiet", "--data-dir", "--batch-sizes"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "squares"], "squares"),
        (["run", "circles", "--seeds", "0"], "at least 1, got '0'"),
        (["run", "circles", "--epochs", "many"], "got 'many'"),
        (["run", "circles", "--epochs=--"], "argument --epochs: expected one argument"),
        (["run", "circles", "--dataset", "mnist"], "--dataset"),
        (["run", "mnist", "--batch-sizes", "16,x"], "'x'"),
        (["run", "mnist", "--batch-sizes", "16,16"], "different batch sizes"),
        (["fly"], "fly"),
        (["run"], "STUDY"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert "--help" in error


def test_bad_values_are_one_line_and_return_2(tmp_path, capsys):
    missing, out = str(tmp_path / "nowhere"), str(tmp_path / "out")
    assert main(["run", "mnist", "--data-dir", missing, "--out", out, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bnjax: error: the data directory")
    assert error.count("\n") == 1
    file = tmp_path / "file"
    file.touch()
    assert main(["run", "circles", "--out", str(file)]) == 2
    assert "must be a directory" in capsys.readouterr().err


def test_a_run_prints_its_tables_and_saves_its_files(tmp_path, capsys, monkeypatch):
    some = {name: circles.VARIANTS[name] for name in ("none", "after", "before")}
    monkeypatch.setattr(circles, "VARIANTS", some)
    assert main(["run", "circles", "--seeds", "2", "--epochs", "2", "--out", str(tmp_path / "new" / "out")]) == 0
    out = capsys.readouterr().out
    assert "circles, 2 seeds: mean ± 95 % interval" in out
    assert "before activation" in out
    assert "S1.5" in out
    saved = {path.name for path in (tmp_path / "new" / "out").iterdir()}
    assert {"results.json", "curves.npz", "summary.md", "learning_curves.png"} <= saved
    assert json.loads((tmp_path / "new" / "out" / "results.json").read_text())["study"] == "circles"


def test_quiet_prints_nothing(tmp_path, capsys, monkeypatch):
    class Quick:
        Options = circles.Options

        def run(self, options, report):
            from bnjax.studies.evidence.results import Results

            report.task(type("P", (), {"name": "a", "label": "a", "length": 1}))(1, {"test_accuracy": 0.5})
            return Results("circles", {}, range(options.seeds)), {}

    monkeypatch.setattr(console.Study, "load", lambda self: Quick())
    assert main(["run", "circles", "--quiet", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr() == ("", "")


def test_an_interruption_leaves_nothing(tmp_path, capsys, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(console.Study, "load", interrupted)
    assert main(["run", "circles", "--quiet", "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_module_is_the_same_command_and_starts_light():
    run = subprocess.run([sys.executable, "-m", "bnjax", "run", "--help"], capture_output=True, text=True, check=True)
    assert "circles" in run.stdout
    modules = "import sys; from bnjax.studies.cli.arguments import make_parser; make_parser(); "
    modules += "print('flax' in sys.modules, 'matplotlib' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", modules], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]
