"""Studies in a notebook: one line of progress while they run, tables and figures as a notebook shows them."""

import io
from collections.abc import Sequence
from typing import Any

from bnjax._extras import needs
from bnjax.studies import STUDIES
from bnjax.studies.engine.plan import Plan
from bnjax.studies.evidence.plots import Figure
from bnjax.studies.evidence.results import Results, claim_rows, markdown_table, metric_rows

with needs("notebooks"):
    from IPython import display


class Progress:
    """A line of text that says what is done, a `bnjax.studies.engine.training.Report`."""

    def __init__(self):
        self._line = display.display(display.Pretty("starting"), display_id=True)

    def expect(self, count: int) -> None:
        """Hears of trainings to come."""

    def task(self, plan: Plan):
        """Begins a training."""

        def update(done: float, means: dict[str, float]) -> None:
            shown = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in sorted(means.items())[:3])
            self.say(f"{plan.label}: {done:g} of {plan.length}; {shown}")

        return update

    def reading(self, text: str, fraction: float) -> None:
        """Hears that data is being read."""
        self.say(f"{text}: {100 * fraction:.0f} %")

    def say(self, text: str) -> None:
        """Replaces the line; outside of a notebook there is none."""
        if self._line is not None:
            self._line.update(display.Pretty(text))


def run(study: str, **options: Any) -> tuple[Results, dict[str, Figure]]:
    """Runs a study as `bnjax run` does, but saves nothing, and returns its results and its figures by name.

    The options are attributes of the study's `Options`, such as seeds and epochs.
    """
    module, progress = STUDIES[study].load(), Progress()
    results = module.run(module.Options(**options), progress)
    progress.say("done")
    return results


def show(figure: Figure) -> display.Image:
    """Shows a figure as an image, whatever matplotlib's backend is."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return display.Image(content.getvalue())


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> display.Markdown:
    """Shows a table."""
    return display.Markdown(markdown_table(header, [[str(cell) for cell in row] for row in rows]))


def metrics(results: Results) -> display.Markdown:
    """Shows mean ± 95 % interval over seeds of each variant."""
    return table(*metric_rows(results))


def claims(results: Results) -> display.Markdown:
    """Shows the claims of the study's source, with what was measured and the verdicts."""
    return table(*claim_rows(results.claims))
