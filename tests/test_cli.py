import io
import json
import shutil
import subprocess
import sys
import webbrowser
from pathlib import Path

import pytest
from rich.console import Console

from bnjax.studies import STUDIES, circles
from bnjax.studies.cli import console, report
from bnjax.studies.cli.main import main
from bnjax.studies.evidence.claims import lessons
from bnjax.studies.evidence.results import SOURCES, Results, metric_rows


@pytest.fixture(autouse=True)
def columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def opened(monkeypatch):
    """What was opened in the browser, which is there unless a test says otherwise."""
    pages = []
    monkeypatch.setattr(webbrowser, "open", lambda url: pages.append(url) or True)
    return pages


def check_width(text, most=80):
    """Lines are no longer, but for a path that is, on a line of its own."""
    for line in text.splitlines():
        assert len(line) <= most or " " not in line.strip().rstrip(","), line


def in_one_line(text):
    return " ".join(text.split())


def check_blocks(text, judgments):
    """Each claim is a block of its verdict and name, statement, and published and measured values."""
    blocks = {block.partition("\n")[0]: in_one_line(block) for block in text.split("\n\n")}
    for judgment in judgments:
        claim = judgment.claim
        p = "" if judgment.p_text == "–" else f", p {judgment.p_text}"
        block = blocks[f"{judgment.verdict}  {claim.id}{p}"]
        parts = (claim.statement, f"published: {claim.published}", f"measured: {judgment.measured}")
        places = [block.index(in_one_line(part)) for part in parts]
        assert places == sorted(places)
        assert in_one_line(claim.amended) in block


def test_list_and_help(capsys):
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    check_width(listed)
    for study in STUDIES.values():
        assert in_one_line(f"{study.name} {study.summary} {study.source};") in in_one_line(listed)
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
    "command", [(), ("run",), ("claims",), ("report",), ("compile",), *(("run", n) for n in STUDIES)]
)
def test_help_fits_the_terminal(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    text = capsys.readouterr().out
    check_width(text)
    assert ("--open" in text) == (len(command) == 2 or command in (("claims",), ("report",)))


@pytest.mark.parametrize("name", [name for name in STUDIES if (SOURCES / f"{name}.json").exists()])
def test_tables_fit_the_terminal_and_lose_nothing(name):
    results = Results.published(name)
    results.judge(STUDIES[name].load().CLAIMS)
    results.texts = [("inside", "x = [1 2]")]
    header, rows = metric_rows(results)
    for width in (60, 80, 120):
        out = io.StringIO()
        console.print_tables(results, Console(file=out, width=width))
        text = out.getvalue()
        assert max(map(len, text.splitlines())) <= width and "inside\nx = [1 2]\n" in text
        check_blocks(text, results.claims)
        assert text.count("mean ± 95 % interval") == 1
        whole = " ".join(text.splitlines()) + " "
        assert all(f" {cell} " in whole for row in rows for cell in row[1:] if cell)
        assert all(f" {word} " in whole for name in header for word in name.split())


def test_only_a_terminal_has_colors(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    results = Results.published("circles")
    results.judge(circles.CLAIMS)
    texts = []
    for is_terminal in (True, False):
        out = io.StringIO()
        console.print_tables(results, Console(file=out, width=80, force_terminal=is_terminal, highlight=False))
        texts.append(out.getvalue())
    assert "\x1b[32mreproduced\x1b[0m  \x1b[1mS1.1\x1b[0m" in texts[0] and "\x1b" not in texts[1]


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


def test_a_run_prints_its_tables_and_saves_its_files(tmp_path, capsys, monkeypatch, opened):
    some = {name: circles.VARIANTS[name] for name in ("none", "after", "before")}
    monkeypatch.setattr(circles, "VARIANTS", some)
    monkeypatch.chdir(tmp_path)
    assert main(["run", "circles", "--seeds", "2", "--epochs", "2", "--out", "new/out"]) == 0
    out = capsys.readouterr().out
    check_width(out)
    assert "circles, 2 seeds: mean ± 95 % interval" in out
    assert "before activation" in out
    judgments = [claim.judge(Results("circles", {"epochs": 2}, range(2))) for claim in circles.CLAIMS]
    check_blocks(out, judgments)
    assert f"\ncircles: Of {len(judgments)} claims, {len(judgments)} undecided.\nsaved after " in out
    saved = {path.name for path in (tmp_path / "new" / "out").iterdir()}
    files = {"report.html", "results.json", "curves.npz", "summary.md", "learning_curves.png"}
    assert files <= saved and all(str(Path("new/out") / name) in out for name in files)
    assert json.loads((tmp_path / "new" / "out" / "results.json").read_text())["study"] == "circles"
    assert "S1.16 (fresh)" in (tmp_path / "new" / "out" / "report.html").read_text() and not opened


class Quick:
    """A study that trains nothing."""

    Options, CLAIMS = circles.Options, ()

    def run(self, options, report):
        report.task(type("P", (), {"name": "a", "label": "a", "length": 1}))(1, {"test_accuracy": 0.5})
        return Results("circles", {}, range(options.seeds)), {}


@pytest.fixture
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(console.Study, "load", lambda self: Quick())
    monkeypatch.chdir(tmp_path)
    return ["run", "circles", "--out", "out"]


def test_quiet_prints_nothing(quick, capsys):
    assert main([*quick, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_open_shows_the_report(quick, capsys, opened):
    page = Path("out/report.html").resolve()
    assert main([*quick, "--open"]) == 0
    assert opened == [page.as_uri()] and "Batch norm: circles" in page.read_text()
    assert capsys.readouterr().out.count(str(Path("out/report.html"))) == 1
    page.unlink()
    assert main([*quick, "--open", "--resume"]) == 0  # where there is nothing left to do
    assert opened == 2 * [page.as_uri()] and page.exists()
    assert main(["report", "out", "--out", "page.html", "--open"]) == 0
    assert opened[2:] == [Path("page.html").resolve().as_uri()]


def test_open_tries_no_browser_when_the_run_failed(quick, capsys, opened):
    assert main(quick) == 0
    assert main([*quick, "--open"]) == 2
    assert main(["report", "nowhere", "--open"]) == 2
    assert main(["claims", "--data-dir", "nowhere", "--open"]) == 2
    assert not opened


def test_open_says_where_there_is_no_browser(quick, capsys, monkeypatch):
    def fails(url):
        raise webbrowser.Error("could not locate runnable browser")

    for browser in (lambda url: False, fails):
        monkeypatch.setattr(webbrowser, "open", browser)
        assert main([*quick, "--force", "--open"]) == 0
        page = Path("out/report.html")
        assert capsys.readouterr().err == f"bnjax: no browser can be had; the report is {page}\n"


def test_a_report_that_cannot_be_saved_costs_no_numbers(quick, capsys, monkeypatch, opened):
    def fails(run_dir, out):
        raise OSError(28, "No space left on device", str(out))

    assert main(quick) == 0
    capsys.readouterr()
    monkeypatch.setattr(report, "write_report", fails)
    assert main([*quick, "--force", "--open"]) == 0
    page, (out, err) = Path("out/report.html"), capsys.readouterr()
    problem, missing = err.splitlines()
    assert problem.startswith(f"bnjax: {page} can't be saved: ") and "No space left on device" in problem
    assert missing == "bnjax: there is no report to open" and not opened
    assert str(page) not in out and not page.exists()  # that of the earlier run is none of this one
    assert Results.load(Path("out"))


def test_claims_are_blocks_with_a_sentence_a_study(tmp_path, capsys, monkeypatch, opened):
    monkeypatch.chdir(tmp_path)
    for name in ("circles", "deep_linear"):
        Path("runs", name).mkdir(parents=True)
        shutil.copy(SOURCES / f"{name}.json", Path("runs", name, "results.json"))
    names = ("circles", "cifar", "deep_linear")
    assert main(["claims", "--fast", "--open", *(word for name in names for word in ("--study", name))]) == 0
    out = capsys.readouterr().out
    check_width(out)
    text, judged = in_one_line(out), {}
    for entry in json.loads(Path("runs/ledger.json").read_text())["claims"]:
        judged.setdefault(entry["family"], []).append(entry)
    for name in names:
        saved = Results.load(Path("runs", name))
        judgments = console.judge(STUDIES[name].load().CLAIMS, [saved]) if saved else []
        check_blocks(out, judgments)
        if judgments:
            first = lessons(STUDIES[name].load().__file__, judgments)[0]
            assert not first.startswith("Of ") and text.count(f"{name}: {first}") == 1
    count = len(judged["cifar"])
    assert f"cifar: Of {count} claims, {count} undecided." in text and "measured: left out by --fast" in text
    files = [Path("runs", name) for name in ("report.html", "ledger.md", "ledger.json")]
    assert all(str(path) in out and path.exists() for path in files)
    assert opened == [files[0].resolve().as_uri()]


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
