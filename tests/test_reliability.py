"""What docs/reliability.md promises: no run is lost, and no record hurts."""

import contextlib
import dataclasses
import datetime
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnjax import training
from bnjax.studies import STUDIES, circles, data
from bnjax.studies.cli import console, processes
from bnjax.studies.cli.folder import FolderError, reserved
from bnjax.studies.cli.main import main
from bnjax.studies.cli.output import safe_output
from bnjax.studies.cli.report import write_report
from bnjax.studies.engine import Examples, memory, seed_keys, train
from bnjax.studies.engine.saving import Saving, Stopped, completing, stopping_on_signals
from bnjax.studies.evidence import record
from bnjax.studies.evidence.ledger import saved_runs
from bnjax.studies.evidence.results import Results, save
from bnjax.training._roll_call import roll_call
from bnjax.training.checkpoint import CheckpointError, Checkpoints

ROOT = Path(__file__).parents[1]


def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz", ROOT / "tools" / "fuzz.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_run(directory, study="circles", **options):
    values = np.array([0.8, 0.9])
    results = Results(study, {"epochs": 4}, range(2), {"after": ("after", {}, {"test_accuracy": values})})
    results.options = STUDIES[study].options(seeds=2, **options).to_json()
    directory.mkdir(parents=True, exist_ok=True)
    save(results, {}, directory, 1.0, datetime.datetime.now(datetime.UTC))
    return directory / "results.json"


class Quick:
    """A study that trains nothing."""

    Options, CLAIMS = circles.Options, ()

    def run(self, options, report):
        update = report.task(dataclasses.make_dataclass("P", ["name", "label", "length"])("a", "a", 1))
        update(1, {"test_accuracy": 0.5})
        return Results("circles", {}, range(options.seeds)), {}


@pytest.fixture
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(console.Study, "load", lambda self: Quick())
    monkeypatch.chdir(tmp_path)
    return ["run", "circles", "--seeds", "2", "--out"]


# --- results first ----------------------------------------------------------------------------------------------------


class Broken(io.StringIO):
    """A stream behind which there is a full disk, or nobody any more."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (OSError(28, "No space left on device"), 1, "output is lost (No space left on device); files are written"),
        (BrokenPipeError(32, "Broken pipe"), 0, ""),
        (ValueError("I/O operation on closed file."), 1, "output is lost (I/O operation on closed file.)"),
    ],
)
def test_results_do_not_depend_on_standard_output(quick, monkeypatch, capsys, error, status, said):
    monkeypatch.setattr(sys, "stdout", Broken(error))
    assert main([*quick, "out"]) == status
    assert said in capsys.readouterr().err
    assert record.read(Path("out/results.json"))["study"] == "circles"


def test_results_are_saved_before_anything_is_printed(quick, monkeypatch):
    monkeypatch.setattr(console, "print_tables", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([*quick, "out"])
    assert Results.load(Path("out")).options["seeds"] == 2


def test_an_encoding_that_lacks_letters_shows_question_marks(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    with safe_output():
        print("0.80 ± 0.01")
    terminal.seek(0)
    assert terminal.read() == "0.80 ? 0.01\n"


@pytest.mark.exhaustive
def test_records_are_utf8_in_any_locale(tmp_path):
    path = make_run(tmp_path / "circles")
    path.write_bytes(path.read_bytes().replace(b'"label": "after"', '"label": "nach ü"'.encode()))
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "bnjax", "report", str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "1 study" in run.stdout and not run.stderr
    assert "nach ü" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_full_disk_is_named_with_the_file(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"), data.atomic_file(path):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_unfinished_files_of_a_process_that_was_killed_are_removed(tmp_path):
    old, new, other = (tmp_path / name for name in (".a.png-old", ".a.png-new", ".b.png-old"))
    for path in (old, new, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (0, 0))
    with data.atomic_file(tmp_path / "a.png") as file:
        file.write(b"a")
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", ".a.png-new", ".b.png-old"}


# --- the directory ----------------------------------------------------------------------------------------------------


def refused(capsys, arguments, *texts):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("bnjax: error: ") and error.count("\n") == 1
    for text in texts:
        assert text in error


def test_a_directory_is_tried_before_the_first_step(quick, monkeypatch, capsys):
    monkeypatch.setattr(Quick, "run", lambda *arguments: pytest.fail("it was trained"))
    Path("file").touch()
    refused(capsys, [*quick, "file"], "--out must be a directory, but file is a file", "--out file-2\n")
    refused(capsys, [*quick, "file/in"], "file/in can't be written to (Not a directory)", "--out DIRECTORY")
    refused(capsys, [*quick, "a" * 300], "can't be written to (File name too long)")
    refused(capsys, [*quick, "a[1]"], "Orbax loses those in a path with [ or ]", "--out runs/circles-2")
    assert {path.name for path in Path().iterdir()} == {"file"}


def test_finished_results_are_replaced_by_force_only(quick, capsys):
    assert main([*quick, "out"]) == 0
    before = Path("out/results.json").read_bytes()
    words = "out holds finished results of `bnjax run circles --seeds 2`"
    refused(
        capsys, [*quick, "out"], words, "to replace it: bnjax run circles --seeds 2 --out out --force; to keep it: "
    )
    refused(capsys, [*quick, "out"], "to keep it: bnjax run circles --seeds 2 --out out-2\n")
    refused(capsys, [*quick, "out", "--epochs", "7", "--resume"], words)  # it would begin anew
    refused(capsys, [*quick, "out", "--epochs", "7", "--resume"], "--out out --epochs 7 --force; to keep it")
    refused(capsys, ["run", "blobs", "--epochs", "3", "--out", "out"], "out holds results of another study, circles")
    assert Path("out/results.json").read_bytes() == before
    assert main([*quick, "out", "--resume"]) == 0
    assert "out holds the finished results of this run; there is nothing left to do" in capsys.readouterr().out
    assert Path("out/results.json").read_bytes() == before
    Path("out/checkpoints/after-0/7").mkdir(parents=True)
    assert main([*quick, "out", "--force"]) == 0
    assert not Path("out/checkpoints").exists()  # else it might continue what it replaces


def test_a_record_that_cannot_be_read_is_replaced_by_force_only(quick, capsys):
    Path("out").mkdir()
    Path("out/results.json").write_text("{}")
    refused(
        capsys, [*quick, "out"], "out holds a record that can't be read (out/results.json: schema must be 3, got None"
    )
    assert main([*quick, "out", "--force"]) == 0


def test_an_unfinished_run_is_neither_lost(quick, capsys):
    Path("out/checkpoints/after-0/7").mkdir(parents=True)
    ways = "to continue it: bnjax run circles --seeds 2 --out out --resume; to begin anew: "
    refused(capsys, [*quick, "out"], "out holds an unfinished run", ways)
    assert main([*quick, "out", "--resume"]) == 0


def test_two_runs_do_not_share_a_directory(quick, capsys):
    with reserved(Path("out"), "circles", {}, resume=False, force=False):
        refused(capsys, [*quick, "out", "--force"], "another run is saving to out", "--out out-2")
    assert not list(Path("out").iterdir())
    assert main([*quick, "out"]) == 0


def test_the_ledger_keeps_what_it_cannot_read(tmp_path, monkeypatch, capsys):
    path = make_run(tmp_path / "circles")
    path.write_text(path.read_text()[:100])
    monkeypatch.setattr(console, "run_study", lambda *arguments, **options: pytest.fail("it was run"))
    ledger = console.print_ledger(["circles"], 2, False, tmp_path, None, True)
    assert all(
        judgment.reason.startswith("kept as it is: ") and str(path) in judgment.reason for judgment in ledger.judgments
    )
    assert len(path.read_text()) == 100


def test_the_ledger_leaves_out_a_study_whose_directory_is_in_use(tmp_path, monkeypatch):
    def run_study(*arguments, **options):
        raise FolderError("another run is saving to it")

    monkeypatch.setattr(console, "run_study", run_study)
    ledger = console.print_ledger(["circles"], 2, False, tmp_path, None, True)
    assert {judgment.reason for judgment in ledger.judgments} == {"not run: another run is saving to it"}


def test_what_stands_in_the_way_of_files_is_seen_first(quick, capsys):
    Path("a/histograms.png").mkdir(parents=True)
    refused(capsys, [*quick, "a", "--force"], "a holds a directory called histograms.png", "--out a-2")
    Path("b").mkdir()
    Path("b/checkpoints").touch()
    refused(capsys, [*quick, "b", "--force"], "b holds a file called checkpoints, where checkpoints have to be")
    Path("c/.curves.npz-old").mkdir(parents=True)
    os.utime("c/.curves.npz-old", (0, 0))
    assert main([*quick, "c"]) == 0


def test_a_working_directory_with_brackets(quick, monkeypatch, capsys):
    Path("a[1]").mkdir()
    monkeypatch.chdir("a[1]")
    monkeypatch.setenv("HOME", "/home/me")
    refused(capsys, [*quick, "out"], "Orbax loses those in a path with [ or ]", "--out /home/me/runs/circles-2")


def test_a_path_that_is_not_utf8_is_refused(quick, capsys):
    refused(capsys, [*quick, "n\udcff"], "Orbax loses checkpoints in a path that is not UTF-8")


def test_a_figure_that_cannot_be_drawn_costs_no_numbers(quick, monkeypatch, capsys):
    class Figure:
        axes = legends = ()

        def get_suptitle(self):
            return ""

        def savefig(self, *arguments, **options):
            raise RuntimeError("no latex\nmore of it")

    train_ = Quick.run
    monkeypatch.setattr(Quick, "run", lambda *arguments: (train_(*arguments)[0], {"a.png": Figure()}))
    assert main([*quick, "out"]) == 0
    assert capsys.readouterr().err == f"bnjax: {Path('out/a.png')} can't be saved: no latex\n"
    assert record.read(Path("out/results.json"))["figures"] == {}


def test_the_ledger_is_saved_before_it_is_printed(tmp_path, monkeypatch):
    make_run(tmp_path / "circles")
    monkeypatch.setattr(console, "print_claims", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        console.print_ledger(["circles"], 2, False, tmp_path, None, True)
    assert (tmp_path / "ledger.json").exists() and (tmp_path / "ledger.md").exists()


def test_a_page_replaces_no_record(tmp_path, capsys):
    path = make_run(tmp_path)
    refused(capsys, ["report", str(tmp_path), "--out", str(path)], "--out must end with .html")
    assert Results.load(tmp_path)


# --- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"schema": 3', '"schema": 4', "schema 4 is newer than this version reads, 3; upgrade bnjax"),
        ('"seconds": 1.0', '"seconds": "1"', "seconds: expected `float`, got `str`"),
        ('"seconds": 1.0', '"seconds": -1', "seconds: expected `float` >= 0"),
        ('"n": 2', '"n": "2"', "variants[...].metrics[...].n: expected `int`, got `str`"),
        ('"study": "circles"', '"study": "squares"', "study must be one of circles, "),
        ('"seeds": 2', '"seeds": 3', "options.seeds must be the number of seeds, 2"),
        ("0.8,", "0.8, 0.7,", "variants.after.metrics.test_accuracy.values must be one for each of 2 seeds"),
        ('"figures": {}', '"figures": {"../../key.png": ""}', "figures: expected `str` matching regex"),
        ('"schema"', "[" * 100_000 + '"schema"', "the file: JSON is malformed"),
        ('"notes": {}', '"notes": ' + "[" * 100_000 + "]" * 100_000, "its values are nested too deeply"),
    ],
)
def test_a_record_names_file_and_field(tmp_path, old, new, message):
    path = make_run(tmp_path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(record.RecordError) as raised:
        Results.load(tmp_path)
    assert str(raised.value).startswith(f"{path}: {message}") and "\n" not in str(raised.value)


def test_what_is_no_file_is_no_record(tmp_path):
    assert Results.load(tmp_path) is None
    os.mkfifo(tmp_path / "results.json")
    with pytest.raises(record.RecordError, match="is no regular file"):
        Results.load(tmp_path)
    (tmp_path / "results.json").unlink()
    with (tmp_path / "results.json").open("wb") as file:
        file.truncate(2**27)
    with pytest.raises(record.RecordError, match="134,217,728 bytes, more than the 67,108,864 that are read"):
        Results.load(tmp_path)


def test_a_record_cannot_hang_or_break_the_page(tmp_path, capsys):
    make_run(tmp_path / "intact")
    document = json.loads((tmp_path / "intact" / "results.json").read_text())
    large, bare, odd = (json.loads(json.dumps(document)) for _ in range(3))
    large["variants"]["after"]["parameters"] = {"params": {"a": [2**53] * 300_000}}
    del bare["machine"]["cores"]
    odd["variants"] = {"a\n\x1b[31m": {**odd["variants"]["after"], "label": 3}}
    for name, changed in (("large", large), ("bare", bare), ("odd", odd), ("name\udcff", odd)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(changed))
    assert main(["report", str(tmp_path)]) == 0
    out, error = capsys.readouterr()
    assert "2 studies" in out or "2 stud" in out
    lines = error.splitlines()
    assert len(lines) == 3 and all(line.startswith("bnjax: not shown: ") and line.isprintable() for line in lines)
    assert "parameters" in lines[0] and "label" in lines[2]


def test_a_command_of_a_record_moves_no_cursor():
    results = Results("circles", {}, range(2), options={"seeds": 2, "dataset": "x\x1b]0;owned\x07 y"})
    assert results.command == r"bnjax run circles --seeds 2 --dataset 'x\x1b]0;owned\x07 y'"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@pytest.mark.exhaustive
@given(json_values, st.sampled_from([None, *record.Record.__struct_fields__]))
def test_any_json_is_read_or_refused(tmp_path_factory, value, name):
    path = make_run(tmp_path_factory.mktemp("any"))
    document = value if name is None else {**json.loads(path.read_text()), name: value}
    path.write_text(json.dumps(document))
    with contextlib.suppress(record.RecordError):
        Results.load(path)


@pytest.mark.parametrize(
    ("part", "count"),
    [
        *(("commands", 60), ("records", 60), ("weights", 60)),
        *(pytest.param(part, 500, marks=pytest.mark.exhaustive) for part in ("commands", "records", "weights")),
    ],
)
def test_hostile_input(part, count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = []
    outcomes = list(fuzz().PARTS[part](count, 1, found))
    assert not found
    assert len(outcomes) >= count and len(set(outcomes)) > 1


def test_a_page_shows_plain_pictures_of_the_run_only(tmp_path):
    path = make_run(tmp_path / "circles")
    document = json.loads(path.read_text())
    names = ("real.png", "text.png", "link.png", "pipe.png", "none.png", "folder.png")
    document["figures"] = dict.fromkeys(names, "Title. text")
    path.write_text(json.dumps(document))
    picture = ROOT / "docs" / "figures" / "circles_normalizers.png"
    folder = path.parent
    shutil.copy(picture, folder / "real.png")
    (folder / "text.png").write_text("secret")
    (folder / "link.png").symlink_to(picture)
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    count, missing = write_report(tmp_path, tmp_path / "page.html")
    assert count == 1
    assert missing == [
        f"figure {folder / 'text.png'} is no PNG.",
        f"figure {folder / 'link.png'} is a link to another file.",
        f"figure {folder / 'pipe.png'} is no regular file.",
        f"figure {folder / 'none.png'}: No such file or directory.",
        f"figure {folder / 'folder.png'}: Is a directory.",
    ]
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img") == 1 and "secret" not in page and "is a link to another file" in page


def test_one_bad_run_breaks_neither_page_nor_ledger(tmp_path, capsys):
    make_run(tmp_path / "circles")
    make_run(tmp_path / "other").write_text("{")
    runs, unreadable = saved_runs(tmp_path)
    assert list(runs["circles"]) == [tmp_path / "circles"] and len(unreadable) == 1
    assert main(["report", str(tmp_path)]) == 0
    bad = tmp_path / "other" / "results.json"
    assert f"not shown: {bad}: " in capsys.readouterr().err
    ledger = console.print_ledger(["circles"], 2, False, tmp_path, None, False)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"left out: {bad}: " in printed and f"found in {tmp_path / 'circles'}" in printed
    assert ledger.seeds == {"circles": 2}


# --- checkpoints and signals ------------------------------------------------------------------------------------------


def test_the_first_checkpoint_is_read_back(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, {}, every=0) as checkpoints:
        monkeypatch.setattr(checkpoints, "_read", lambda step: (None, None, "it is gone"))
        checkpoints.save(1, {"a": np.ones(3)})
        with pytest.raises(CheckpointError, match=r"the checkpoint of step 1 .* can't be read back \(it is gone\)"):
            checkpoints.wait()


def test_a_path_under_which_checkpoints_are_lost_is_refused(tmp_path):
    for name in ("a[1]", "a]", *(("a\\b",) if os.sep != "\\" else ())):
        with pytest.raises(CheckpointError, match="can't hold checkpoints: Orbax loses those"):
            Checkpoints(tmp_path / name, {})
    with Checkpoints(tmp_path / "ü {a} *", {}, every=0) as checkpoints:
        checkpoints.save(1, {"a": np.ones(3)})
    with Checkpoints(tmp_path / "ü {a} *", {}) as checkpoints:
        assert checkpoints.restore({"a": np.zeros(3)})[0] == 1


@dataclasses.dataclass
class Told:
    """A listener that does something after the first call."""

    act: object

    def expect(self, count):
        pass

    def task(self, plan):
        return lambda done, means: self.act() if done == 1 else None

    def reading(self, text, fraction):
        pass


@pytest.fixture(scope="module")
def small():
    circle = data.circles()
    plan = circles.networks(circles.Options())["after"].epochs(4, len(circle.train.y))
    examples = Examples.of(circle.train, {"test": circle.test})
    return plan, lambda seeds, **options: train(plan, {"key": seed_keys(seeds)}, examples, **options)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_from_which_the_run_goes_on(tmp_path, small, number, capfd):
    _, carry_out = small
    whole = carry_out(range(2))
    saving = Saving(tmp_path, {}, every=1000.0)
    with pytest.raises(Stopped) as stopped, stopping_on_signals():
        carry_out(range(2), report=Told(lambda: os.kill(os.getpid(), number)), options=circles.Options(saving=saving))
    assert stopped.value.signal == number
    assert "saving a checkpoint, then stopping" in capfd.readouterr().err
    assert [path.name for path in tmp_path.glob("*/*/")] == ["2"]
    resumed = dataclasses.replace(saving, resume=True)
    begun = []
    again = carry_out(range(2), report=Told(lambda: begun.append(1)), options=circles.Options(saving=resumed))
    assert not begun  # its first epoch was not trained again
    jax.tree.map(np.testing.assert_array_equal, again.metrics, whole.metrics)
    jax.tree.map(np.testing.assert_array_equal, again.state, whole.state)


def test_a_signal_is_heard_where_standard_error_is_broken(tmp_path, small, monkeypatch):
    _, carry_out = small
    saving = Saving(tmp_path, {}, every=1000.0)
    monkeypatch.setattr(sys, "stderr", Broken(BrokenPipeError(32, "Broken pipe")))
    stop = Told(lambda: os.kill(os.getpid(), signal.SIGTERM))
    with safe_output(), pytest.raises(Stopped), stopping_on_signals():
        carry_out(range(2), report=stop, options=circles.Options(saving=saving))
    assert [path.name for path in tmp_path.glob("*/*/")] == ["2"]


def test_a_second_signal_ends_the_process(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with completing(), stopping_on_signals():
        signal.raise_signal(signal.SIGTERM)
        assert not ended
        signal.raise_signal(signal.SIGTERM)
    assert ended == [143]


def test_a_signal_waits_for_results_that_are_being_written(quick, monkeypatch):
    write = record.write
    monkeypatch.setattr(record, "write", lambda document: signal.raise_signal(signal.SIGTERM) or write(document))
    monkeypatch.setattr(os, "_exit", lambda status: None)
    assert main([*quick, "out"]) == 0
    assert Results.load(Path("out"))


def test_a_finished_training_of_a_long_run_is_kept(tmp_path, small):
    _, carry_out = small
    saving = Saving(tmp_path, {}, every=1000.0, started=time.monotonic() - 2000)
    carry_out(range(2), options=circles.Options(saving=saving))
    assert {path.name for path in tmp_path.glob("*/*/")} >= {"4"}
    begun = []
    resumed = dataclasses.replace(saving, resume=True)
    carry_out(range(2), report=Told(lambda: begun.append(1)), options=circles.Options(saving=resumed))
    assert not begun


def test_a_signal_between_trainings_stops_at_once():
    with pytest.raises(Stopped, match="stopped by SIGTERM"), stopping_on_signals():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_command_says_how_to_go_on(quick, monkeypatch, capsys, number, status):
    monkeypatch.setattr(Quick, "run", lambda *arguments: os.kill(os.getpid(), number))
    assert main([*quick, "out"]) == status
    name = signal.Signals(number).name
    expected = (
        f"bnjax: stopped by {name}; nothing was saved yet; to begin anew: bnjax run circles --seeds 2 --out out\n"
    )
    assert capsys.readouterr().err == expected
    Path("out/checkpoints/after-0/7").mkdir(parents=True)
    assert main([*quick, "out", "--resume"]) == status
    expected = f"bnjax: stopped by {name}; to go on: bnjax run circles --seeds 2 --out out --resume\n"
    assert capsys.readouterr().err == expected


def test_a_checkpoint_of_a_later_step_than_the_last_is_refused(tmp_path, small):
    _, carry_out = small
    saving = Saving(tmp_path, {}, every=0.0)
    carry_out(range(2), options=circles.Options(saving=saving))
    (folder,) = tmp_path.iterdir()
    (folder / "4").rename(folder / "999")
    with pytest.raises(CheckpointError, match=r"the checkpoint of step 999 in .* can't be one of 4 steps"):
        carry_out(range(2), options=circles.Options(saving=dataclasses.replace(saving, resume=True)))


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_seeds_that_do_not_fit_are_trained_in_parts(small, monkeypatch):
    plan, carry_out = small
    parts = [carry_out(seeds) for seeds in (range(2), range(2, 4), range(4, 5))]
    whole = carry_out(range(5))
    circle = data.circles()
    examples = Examples.of(circle.train, {"test": circle.test})
    one = memory.needed(plan, {"key": seed_keys([0])[0]}, examples)[0]
    monkeypatch.setattr(memory, "FEW", 1)
    monkeypatch.setattr(memory, "AT_ONCE", int(2.5 * one))
    cut = carry_out(range(5))
    for name in ("metrics", "looked", "state"):
        joined = jax.tree.map(lambda *v: np.concatenate(v), *(getattr(part, name) for part in parts))
        jax.tree.map(np.testing.assert_array_equal, getattr(cut, name), joined)
        for a, b in zip(jax.tree.leaves(getattr(cut, name)), jax.tree.leaves(getattr(whole, name)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_needed_memory_is_estimated(small):
    plan, _ = small
    circle = data.circles()
    examples = Examples.of(circle.train, {"test": circle.test})
    training_bytes, results = memory.needed(plan, {"key": seed_keys([0])[0]}, examples)
    inputs = circle.train.x.nbytes + circle.train.y.nbytes
    hidden = 500 * 4 * 50  # the activations of a layer for the evaluated examples
    assert max(inputs, hidden) < training_bytes < 2**21
    state = jax.eval_shape(plan.create, {"key": seed_keys([0])[0]})
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert results == held + plan.steps * 2 * 4 + plan.parts * 2 * 4  # losses and accuracies of training and test


def test_more_seeds_than_fit_are_refused_at_the_start(small, monkeypatch, capsys):
    _, carry_out = small
    monkeypatch.setattr(memory, "FEW", 1)
    monkeypatch.setattr(memory, "free_memory", lambda: 1e6)
    with pytest.raises(
        ValueError, match=r"the results of 2,000 seeds .* need .* GiB, and 0.0 GiB .*: at most [0-9]+ fit"
    ):
        carry_out(range(2000))
    assert main(["run", "circles", "--seeds", str(2**32)]) == 2
    assert capsys.readouterr().err == "bnjax: error: --seeds must be from 1 to 1,048,576, got 4,294,967,296.\n"


def test_the_results_of_all_trainings_of_a_run_are_counted(small, monkeypatch):
    plan, _ = small
    circle = data.circles()
    examples, settings = Examples.of(circle.train, {"test": circle.test}), {"key": seed_keys(range(100))}
    each = memory.needed(plan, {"key": seed_keys([0])[0]}, examples)[1]
    monkeypatch.setattr(memory, "free_memory", lambda: 100 * 5.5 * each)
    assert memory.settings_at_once(plan, settings, examples, 3) > 0
    with pytest.raises(ValueError, match="of 4 trainings"):
        memory.settings_at_once(plan, settings, examples, 4)


def test_free_memory_is_what_the_system_says():
    assert 2**20 < memory.free_memory() < 2**50


# --- several processes ------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def call(*processes, seconds=10.0, coordinator=None):
    """What a roll call of processes, (index, number told) each, raises in each of them, and what is reported."""
    coordinator, said = coordinator or f"127.0.0.1:{free_port()}", []

    def one(index, told):
        try:
            roll_call(coordinator, told, index, seconds=seconds, report=said.append)
        except RuntimeError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(one, *zip(*processes, strict=True))), said


def test_a_roll_call_of_all():
    assert call((0, 3), (2, 3), (1, 3)) == (["", "", ""], [])
    assert call((0, 1)) == ([""], [])


@pytest.mark.parametrize(
    ("processes_", "message"),
    [
        (((0, 3), (1, 3), (1, 3)), "two processes were started as process 1."),
        (((0, 2), (1, 3)), "process 1 was told of 3 processes, and process 0 of 2."),
    ],
)
def test_a_roll_call_ends_all_alike(processes_, message):
    assert set(call(*processes_)[0]) == {message}


@pytest.mark.exhaustive
def test_a_roll_call_says_for_whom_it_waits_and_ends_in_time():
    found, said = call((0, 4), (2, 4), seconds=1.5)
    assert set(found) == {found[0]} and "processes 1, 3 of 4 did not come to 127.0.0.1:" in found[0]
    assert "within 1.5 s" in found[0]
    assert len(said) == 1 and "waiting for processes 1, 3 of 4 at 127.0.0.1:" in said[0]
    (alone,), said = call((1, 2), seconds=1.5)
    assert "process 0 was not at 127.0.0.1:" in alone and "waiting for process 0" in said[0]


def test_a_roll_call_checks_host_and_port_first():
    assert "'nowhere.invalid' can't be resolved" in call((1, 2), coordinator="nowhere.invalid:99")[0][0]
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        assert f"port {port} is in use on this machine" in call((0, 2), coordinator=f"127.0.0.1:{port}")[0][0]


def stranger_at(port):
    """A connection to a port, once somebody listens there."""
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port), timeout=5)


def test_a_roll_call_passes_over_strangers():
    port, found = free_port(), []
    waiting = threading.Thread(target=lambda: found.append(call((0, 2), coordinator=f"127.0.0.1:{port}")))
    waiting.start()
    for text in (b"GET / HTTP/1.1\r\n", b"[" * 9000 + b"\n", b'{"id": "x"}\n', b""):
        with stranger_at(port) as stranger:
            stranger.sendall(text)
    assert call((1, 2), coordinator=f"127.0.0.1:{port}")[0] == [""]
    waiting.join()
    assert found == [([""], [])]


def test_a_roll_call_ends_in_time_whatever_a_stranger_sends(monkeypatch):
    port, found = free_port(), []
    waiting = threading.Thread(
        target=lambda: found.append(call((0, 2), coordinator=f"127.0.0.1:{port}", seconds=1.0)), daemon=True
    )
    began = time.monotonic()
    waiting.start()
    with stranger_at(port) as stranger, contextlib.suppress(OSError):
        while waiting.is_alive() and time.monotonic() - began < 30:
            stranger.sendall(b"x")
            time.sleep(0.3)
    waiting.join(1)
    assert "process 1 of 2 did not come" in found[0][0][0]
    assert time.monotonic() - began < 12


@pytest.mark.parametrize(
    ("coordinator", "message"),
    [
        ("127.0.0.1:99999", "port must be from 1 to 65535, got 99999"),
        ("a" * 70 + ":99", "can't be resolved (it is no name of a host)"),
    ],
)
def test_addresses_that_are_none(coordinator, message):
    for index in (0, 1):
        assert message in call((index, 2), coordinator=coordinator)[0][0]


def test_a_coordinator_elsewhere_is_said():
    _, said = call((0, 10**9), coordinator=f"10.255.255.1:{free_port()}", seconds=0.1)
    assert said[0].startswith("10.255.255.1 is no address of this machine")


def test_settings_are_compared_by_digest(monkeypatch):
    processes.check_equal({"seeds": 3, "out": Path("a")})

    def other(of_all):
        changed = of_all.copy()
        changed[1] += 1
        return np.stack([of_all, changed])

    monkeypatch.setattr(processes.multihost_utils, "process_allgather", other)
    with pytest.raises(ValueError, match=r"must be started alike, but they differ in out\."):
        processes.check_equal({"seeds": 3, "out": Path("a"), "parallel": "jit"})


@pytest.mark.parametrize(
    ("ending", "status", "said"),
    [
        ("exit 0", 0, ""),
        ("echo bnjax: error: bad >&2; exit 2", 2, "bnjax: error: bad\n"),
        ("kill -TERM $$", 143, ""),
        (
            "echo 'F1130 17:59:28.9 1 parse_flags.cc:80] Unknown flag in XLA_FLAGS: --nonsense' >&2; exit 1",
            2,
            "bnjax: error: JAX ended: F1130 17:59:28.9 1 parse_flags.cc:80] Unknown flag in XLA_FLAGS: --nonsense\n",
        ),
        (
            "echo seen >&2; echo 'I1130 17:59:28.9 1 coordination_service_agent.cc:1] joins' >&2; "
            "echo 'E1130 17:59:28.9 1 coordination_service_agent.cc:1] lost' >&2; echo more of it >&2; "
            "echo 'F1130 17:59:28.9 1 client.h:80] Terminating' >&2; echo '    @ 0x7f stack' >&2; kill -ABRT $$",
            2,
            "seen\nbnjax: error: another process of this run has died, or gives no sign of life\n",
        ),
    ],
)
def test_an_abort_of_jax_is_one_line(tmp_path, monkeypatch, capfd, ending, status, said):
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/bash\nulimit -c 0\n[ $BNJAX_WORKER = 1 ] || exit 99\n{ending}\n")
    fake.chmod(fake.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setattr(sys, "executable", str(fake))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert processes.watch(["run", "cifar"]) == status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert capfd.readouterr().err == said


# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["run", "circles", "--see", "1"],
            "bnjax run circles: error: unrecognized arguments: --see 1; did you mean --seeds? ",
        ),
        (["run", "circle"], "did you mean circles? (see bnjax run --help)"),
        (["rnu"], "did you mean run? (see bnjax --help)"),
        (["run", "mnist", "--dataset", "minst"], "did you mean mnist? (see bnjax run mnist --help)"),
        (["claims", "--quite"], "did you mean --quiet? (see bnjax claims --help)"),
    ],
)
def test_what_may_have_been_meant(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_short_options(quick, capsys):
    assert main(["-V"]) == 0
    assert capsys.readouterr().out.startswith("bnjax ")
    assert main([*quick, "out", "-q"]) == 0
    assert capsys.readouterr() == ("", "")


def test_the_first_line_says_what_runs_where(quick, capsys):
    assert main([*quick, "out"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"circles: 2 seeds on {jax.device_count()} × cpu, saving to out"


def test_a_line_a_minute_where_there_is_no_terminal(quick, monkeypatch, capsys):
    monkeypatch.setattr(console, "_PERIOD", 0.1)

    def run(self, options, report):
        report.expect(2)
        plan = dataclasses.make_dataclass("P", ["name", "label", "length"])
        first = report.task(plan("a", "a", 10))
        time.sleep(0.25)
        first(0, {})  # the host was told before anything was done
        first(5, {"test_accuracy": 0.25})
        time.sleep(0.25)
        report.task(plan("b", "b", 10))(10, {})
        first(10, {"test_accuracy": 0.5})
        time.sleep(0.25)
        return Results("circles", {}, range(options.seeds)), {}

    monkeypatch.setattr(Quick, "run", run)
    assert main([*quick, "out"]) == 0
    lines = [re.sub(r"about [0-9:]+ left", "about T left", line) for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines.index("a: compiling (0 % of all)") < lines.index(
        "a: 5 of 10, test accuracy 0.2500 (25 % of all, about T left)"
    )
    assert "a: 10 of 10, test accuracy 0.5000 (100 % of all)" in lines


def test_a_platform_that_is_not_there_is_one_line(quick, monkeypatch, capsys):
    def devices():
        raise RuntimeError("Unable to initialize backend 'cuda': no driver\nmore")

    monkeypatch.setattr(jax, "devices", devices)
    refused(
        capsys, [*quick, "out"], "JAX can't start on the platform cpu (Unable to initialize backend 'cuda': no driver)"
    )


@pytest.mark.exhaustive
def test_a_backend_of_matplotlib_that_is_none_stops_nothing(tmp_path):
    command = [sys.executable, "-m", "bnjax", "claims", "--study", "cifar", "--fast", "--out", str(tmp_path)]
    run = subprocess.run(
        command, env={**os.environ, "MPLBACKEND": "nonsense"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0 and not run.stderr


@pytest.mark.parametrize("arguments", [["claims", "--data-dir", "nowhere"], ["report", "nowhere"]])
def test_a_directory_that_is_not_there_is_an_error(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(capsys, arguments, "nowhere is no directory")


def test_the_wait_of_processes_is_stated():
    assert training.WAIT_SECONDS == 300 and training.HEARTBEAT_SECONDS == 30


def test_importing_the_studies_starts_no_backend():
    code = "import jax; from jax._src import xla_bridge; from bnjax.studies import STUDIES\n"
    code += "for study in STUDIES.values(): study.load()\nprint(len(xla_bridge._backends))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "0\n"


@pytest.mark.parametrize("redirections", [">&-", ">&- 2>&-", ">&- 2>&- <&-"])
def test_closed_streams(redirections, tmp_path):
    command = f"{sys.executable} -m bnjax list {redirections}"
    assert subprocess.run(["bash", "-c", command], check=False).returncode == 0
    if "2>&-" in redirections:
        run = subprocess.run(["bash", "-c", f"{sys.executable} -m bnjax report nowhere 2>&-"], stdout=subprocess.PIPE)
        assert run.returncode == 2 and not run.stdout
