"""A study on the terminal: progress while it runs, tables at the end, and its files."""

import datetime
import time
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from bnjax.studies import Options, Study
from bnjax.studies.results import Results, claim_rows, metric_rows, save


class _Report:
    """Shows a bar for each variant."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.read: dict[str, TaskID] = {}

    def task(self, variant):
        task = self.progress.add_task(variant.label, total=variant.epochs, now="compiling")

        def update(epoch: int, means: dict[str, float]) -> None:
            chosen = next((k for k in ("test_accuracy", "validation_accuracy", "train_accuracy") if k in means), None)
            now = f"{chosen.replace('_', ' ')} {means[chosen]:.4f}" if chosen else ""
            self.progress.update(task, completed=epoch, now=now)

        return update

    def reading(self, text: str, fraction: float) -> None:
        if text not in self.read:
            self.read[text] = self.progress.add_task(text, total=1, now="")
        self.progress.update(self.read[text], completed=fraction)


def run_study(study: Study, options: Options, out: Path, quiet: bool) -> Results:
    """Runs a study, prints its tables, and saves its files.

    Args:
      study: which.
      options: seeds, epochs and data.
      out: directory for `results.json`, `curves.npz`, `summary.md` and figures.
      quiet: whether to print nothing.

    Returns:
      What was measured.
    """
    console = Console(quiet=quiet, highlight=False)
    started, clock = datetime.datetime.now(datetime.UTC), time.perf_counter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=console, disable=quiet) as progress:
        results, figures = study.load().run(options, _Report(progress))
    print_tables(results, console)
    seconds = time.perf_counter() - clock
    paths = save(results, figures, out, seconds, started)
    console.print(f"{len(paths)} files saved in {out}, among them results.json and summary.md ({seconds:.1f} s)")
    return results


def print_tables(results: Results, console: Console) -> None:
    """Prints the metrics of the variants, what a study has beside them, and the claims."""
    count = len(results.seeds)
    _print_table(
        console, f"{results.study}, {count} seed{'s' * (count > 1)}: mean ± 95 % interval", *metric_rows(results)
    )
    for title, text in results.texts:
        console.print(f"\n{title}", style="bold", markup=False)
        console.print(text, markup=False)  # brackets of arrays are no markup
    if results.claims:
        _print_table(console, "claims of the source", *claim_rows(results))


def _print_table(console: Console, title: str, header: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in header:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    console.print(table)
