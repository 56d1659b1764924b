"""A study on the terminal: progress while it runs, tables at the end, and its files."""

import contextlib
import dataclasses
import datetime
import itertools
import json
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from bnjax._extras import needs
from bnjax.studies import STUDIES, Options, Study
from bnjax.studies.cli.folder import FolderError, is_unfinished, reserved
from bnjax.studies.cli.logs import Logs
from bnjax.studies.cli.report import PAGE, learned, save_page
from bnjax.studies.data import DataError, atomic_file
from bnjax.studies.engine.saving import Saving, completing
from bnjax.studies.evidence import ledger, record
from bnjax.studies.evidence.claims import Judgment, judge
from bnjax.studies.evidence.record import RecordError
from bnjax.studies.evidence.results import GAP, Results, column_width, metric_tables, save
from bnjax.studies.evidence.statistics import seeds_in_words

with needs("studies"):
    from rich import box
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
    from rich.table import Column, Table
    from rich.text import Text

_SHOWN = ("test_accuracy", "validation_accuracy", "train_accuracy", "train_loss")
_PERIOD = 60  # seconds between two lines where there is no terminal
_COLUMNS = 6  # columns of numbers in a table
_LABEL = 24  # width of a table's first column, where there is no room for more
_STYLES = {"reproduced": "green", "not reproduced": "red", "compatible": "blue", "wrong in the source": "magenta"}


class _Report:
    """Shows a bar for each training and the time left for all, or a line a minute where there is no terminal; logs."""

    def __init__(self, progress: Progress, logs: Logs):
        self.progress, self.logs, self.expected = progress, logs, 0
        self.read: dict[str, TaskID] = {}
        self.done: dict[int, float] = {}  # the fraction of each training
        self.all: TaskID | None = None
        self.started, self.latest, self.ended = time.monotonic(), "starting", threading.Event()
        if progress.disable:
            threading.Thread(target=self._speak, daemon=True).start()

    def close(self) -> None:
        self.ended.set()

    def _speak(self) -> None:
        while not self.ended.wait(_PERIOD):
            _write(self.progress.console, self.latest)

    def expect(self, count: int) -> None:
        self.expected += count

    def task(self, plan):
        number = len(self.done)
        self.done[number] = 0.0
        task = self.progress.add_task(plan.label, total=plan.length, now="compiling")
        self.logs.begin(plan.name, plan.length)
        self.tell(f"{plan.label}: compiling")

        def update(done: float, means: dict[str, float]) -> None:
            shown = next((k for k in _SHOWN if np.isfinite(means.get(k, np.nan))), None)
            now = f"{shown.replace('_', ' ')} {means[shown]:.4f}" if shown else ""
            self.progress.update(task, completed=done, now=now)
            self.logs.scalars(plan.name, done, {k: v for k, v in means.items() if np.isfinite(v)})
            self.done[number] = done / plan.length
            self.tell(f"{plan.label}: {done:g} of {plan.length}, {now}")

        return update

    def reading(self, text: str, fraction: float) -> None:
        if text not in self.read:
            self.read[text] = self.progress.add_task(text, total=1, now="")
        self.progress.update(self.read[text], completed=fraction)

    def tell(self, text: str) -> None:
        total = max(self.expected, len(self.done))
        fraction, left = sum(self.done.values()) / total, ""
        if 0 < fraction < 1:
            seconds = round((time.monotonic() - self.started) * (1 - fraction) / fraction)
            left = f"about {datetime.timedelta(seconds=seconds)} left"
        if total > 1:
            if self.all is None:
                self.all = self.progress.add_task("all trainings", total=total, now="")
            self.progress.update(self.all, completed=round(sum(self.done.values()), 1), now=left)
        self.latest = f"{text} ({', '.join(filter(None, (f'{100 * fraction:.0f} % of all', left)))})"


def run_study(
    study: Study,
    options: Options,
    out: Path,
    quiet: bool,
    *,
    resume: bool = False,
    force: bool = False,
    checkpoint_every: float = 60.0,
    log: Sequence[str] = (),
) -> Results:
    """Runs a study, saves its files, prints its tables, and returns its results.

    Quietly, it prints nothing. It continues from the checkpoints in `out` with `resume`, and else begins anew, with
    `force` also in place of what is there; a training is saved there every so many seconds. `log` names logs of
    `bnjax.studies.LOGS` to write there too.

    Raises:
      MissingExtraError: if a log's package is not installed.
      FolderError: if `out` can't be saved to, or holds what would be lost.
    """
    is_first = jax.process_index() == 0  # one of several processes speaks and saves
    done, problem, console = None, None, Console(highlight=False, quiet=quiet or not is_first)
    with contextlib.ExitStack() as held:
        try:
            if is_first:
                done = held.enter_context(reserved(out, study.name, options.to_json(), resume=resume, force=force))
        except FolderError as error:
            problem = error
        is_bad, is_done = _of_any(problem is not None), _of_any(done is not None)
        if is_bad:
            raise problem or FolderError(f"process 0 can't save to {out}, and says why")
        if is_done:
            _write(console, f"{out} holds the finished results of this run; there is nothing left to do")
            if done:
                _complain(save_page(out))
                _say_where(console, out, report=[PAGE])
            return done or Results(study.name, {}, ())
        return _run_study(study, options, out, console, resume, checkpoint_every, log if is_first else ())


def _of_any(value: bool) -> bool:
    """Returns whether a value is true in any process."""
    return value if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(value)).any())


def _run_study(
    study: Study, options: Options, out: Path, console: Console, resume: bool, every: float, log: Sequence[str]
) -> Results:
    logs = Logs(log, out, study.name, options.to_json())
    configuration = {"study": study.name, "dataset": getattr(options, "dataset", None)}
    say = lambda text: print(f"bnjax: {text}", file=sys.stderr)  # noqa: E731
    saving = Saving(out / "checkpoints", configuration, every, resume, say)
    options = dataclasses.replace(options, saving=saving, histograms=bool(log))
    started, clock = datetime.datetime.now(datetime.UTC), time.perf_counter()
    label = TextColumn("{task.description}", table_column=Column())  # which is wrapped where there is no room
    columns = (label, BarColumn(10), MofNCompleteColumn(), TimeElapsedColumn(), "{task.fields[now]}")
    device = jax.devices()[0]
    kind = device.device_kind if device.platform == device.device_kind else f"{device.device_kind} ({device.platform})"
    _write(console, f"{study.name}: {seeds_in_words(options.seeds)} on {jax.device_count()} × {kind}, saving to {out}")
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        contextlib.closing(_Report(progress, logs)) as report,
    ):
        results, figures = study.load().run(options, report)
    results.options = options.to_json()
    if jax.process_index() > 0:
        return results
    seconds = time.perf_counter() - clock
    with completing():
        _, missing = save(results, figures, out, seconds, started)
        _complain([*missing, *save_page(out)])
    logs.results(results, out)
    logs.close()
    print_tables(results, console)
    console.print()
    if results.claims:
        _write(console, f"{study.name}: {learned(study.name, results.claims)[0]}")
    console.print(f"saved after {seconds:.1f} s:")
    numbers = ("results.json", "curves.npz")
    _say_where(console, out, report=[PAGE], summary=["summary.md"], figures=list(results.figures), numbers=numbers)
    return results


def _say_where(console: Console, out: Path, **names: Sequence[str]) -> None:
    """Prints the paths of the files of these names that are there."""
    for what, of in names.items():
        if found := [str(out / name) for name in of if (out / name).exists()]:
            _write(console, f"{what}: {', '.join(found)}", "  ")


def _complain(problems: Sequence[str]) -> None:
    for problem in problems:
        print(f"bnjax: {record.plain(problem)}", file=sys.stderr)


def print_ledger(
    names: Sequence[str], seeds: int | None, fast: bool, out: Path, data_dir: str | None, quiet: bool
) -> ledger.Ledger:
    """Prints, saves and returns the verdicts on the claims of some studies, running into `out` what is missing there.

    Beside the ledger it saves the report of all results there.

    What is there with other options is used as it is; only a run with fewer seeds, or one of `bnjax claims --fast`, is
    replaced by a longer one. The number of seeds is each study's own by default; with `fast` only `Study.fast` is run,
    and of the study's data sets the first that can be had. The claims of a study that is left out, or whose data can't
    be had, are undecided, with the reason. Quietly, only the ledger is printed.
    """
    from bnjax.training.checkpoint import CheckpointError

    console, progress = Console(highlight=False), Console(highlight=False, quiet=quiet)
    by_study, counts = {}, {}
    for error in ledger.saved_runs(out)[1]:
        _write(progress, f"left out: {error}")
    for name in names:
        study, saved, reason, choices = STUDIES[name], None, "left out by --fast", []
        if study.fast is not None or not fast:
            common = {**((fast and study.fast) or {}), **({"seeds": seeds} if seeds else {})}
            of_data = [{"dataset": dataset, "data_dir": data_dir} for dataset in study.datasets] or [{}]
            choices, reason = [study.load().Options(**common, **of) for of in of_data], ""
        try:
            saved = Results.load(out / name)
        except RecordError as error:
            choices, reason = [], f"kept as it is: {error}"
            _write(progress, f"{name}: {reason}")
        if saved and not ledger.is_to_be_replaced(saved, study, choices):
            _write(progress, f"{name}: results of `{saved.command}` found in {out / name}")
            choices = []
        for options in choices:
            try:
                try:
                    run_study(study, options, out / name, quiet, resume=True, force=bool(saved))
                except CheckpointError:
                    if not saved or is_unfinished(out / name):
                        raise
                    run_study(study, options, out / name, quiet, force=True)  # in place of the finished, shorter run
                break
            except (CheckpointError, DataError, FolderError) as error:
                reason = reason or f"not run: {error}"
                _write(progress, f"{name}: {error}")
        if runs := ledger.saved_runs(out)[0].get(name):
            counts[name] = max(len(run.seeds) for run in runs.values())
            by_study[name] = judge(study.load().CLAIMS, list(runs.values()))
        else:
            by_study[name] = [Judgment(claim, (), reason) for claim in study.load().CLAIMS]
    judged = ledger.Ledger([judgment for of in by_study.values() for judgment in of], counts)
    judged.save(out)
    _complain(save_page(out) if counts else ())
    for name, judgments in by_study.items():
        print_claims(f"claims of {name}", judgments, console)
    console.print()
    for name, judgments in by_study.items():
        if judgments:
            _write(console, f"{name}: {learned(name, judgments)[0]}")
    _write(console, f"all: {judged.summary()}")
    console.print("saved:")
    _say_where(console, out, report=[PAGE], ledger=["ledger.md", "ledger.json"])
    return judged


def compile_step(name: str, topology: str, parallel: str, batch_size: int | None, json_file: Path | None) -> bool:
    """Compiles a training step as `bnjax.studies.engine.steps` does, prints the report, and saves it where asked to.

    Says whether it compiles, which it does not where it needs more memory than a chip has.
    """
    from bnjax.studies.engine.steps import compile_step as compile_

    console = Console(highlight=False)
    with console.status(f"compiling {name} for {topology}"):
        report = compile_(name, topology, parallel_by=parallel, batch_size=batch_size)
    _print_table(console, f"training step of {report.name}", ["", ""], report.rows(), show_header=False)
    if report.collectives:
        _print_table(console, "collectives", *report.collective_rows())
    if json_file:
        with atomic_file(json_file) as file:
            file.write(json.dumps(report.to_json(), indent=1).encode() + b"\n")
    return report.memory is not None


def print_tables(results: Results, console: Console) -> None:
    """Prints the metrics of the variants, what a study has beside them, and the claims."""
    title = f"{results.study}, {seeds_in_words(len(results.seeds))}: mean ± 95 % interval"
    for header, rows in metric_tables(results, _COLUMNS, console.width - _LABEL):
        labels, *numbers = zip(header, *rows, strict=True)
        widths = [column_width(column) for column in numbers]
        room = max(console.width - sum(widths) - GAP * len(widths), _LABEL // 2)
        _print_table(console, title, header, rows, widths=[min(max(map(len, labels)), room), *widths])
        title = ""
    for title, text in results.texts:
        console.print(f"\n{title}", style="bold", markup=False)
        console.print(text, markup=False)  # brackets of arrays are no markup
    print_claims("claims of the source", results.claims, console)


def print_claims(title: str, judgments: Sequence[Judgment], console: Console) -> None:
    """Prints a short block for each claim: verdict and name, statement, what was published and measured."""
    if judgments:
        console.print(f"\n{title}", style="bold", markup=False)
    for judgment in judgments:
        claim, verdict = judgment.claim, judgment.verdict
        p = "" if judgment.p_text == "–" else f", p {judgment.p_text}"
        console.print()
        console.print(Text.assemble((verdict, _STYLES.get(verdict, "")), "  ", (claim.id, "bold"), p), soft_wrap=True)
        _write(console, claim.statement, "  ", "  ")
        values = [f"published: {claim.published}", f"measured: {judgment.measured}"]
        together = " | ".join(values)
        for text in [together] if len(together) + 2 <= console.width else values:
            _write(console, text, "  ")
        if claim.amended:
            _write(console, f"changed after results had been seen: {claim.amended}", "  ")


def _write(console: Console, text: str, indent: str = "", hanging: str = "    ") -> None:
    """Prints a text in lines no wider than the terminal, unless a path is."""
    kept: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    together = text.replace(" ± ", "\u00a0±\u00a0")
    lines = textwrap.fill(together, console.width, initial_indent=indent, subsequent_indent=hanging, **kept)
    console.print(lines.replace("\u00a0", " "), markup=False, soft_wrap=True)


def _print_table(
    console: Console,
    title: str,
    header: Sequence[str],
    rows: Sequence[Any],
    widths: Sequence[int | None] = (),
    **options: Any,
) -> None:
    console.print(f"\n{title}" if title else "", style="bold", markup=False)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), **options)
    for name, width in itertools.zip_longest(header, widths):
        table.add_column(name, width=width, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
