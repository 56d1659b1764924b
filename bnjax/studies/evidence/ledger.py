"""The ledger: every claim of the sources with its verdict, from saved results."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from bnjax.studies import STUDIES, Options, Study
from bnjax.studies.data import atomic_file
from bnjax.studies.evidence import record
from bnjax.studies.evidence.claims import Judgment, count, in_words
from bnjax.studies.evidence.results import Results, claim_rows, markdown_table


@dataclasses.dataclass(frozen=True)
class Ledger:
    """The judged claims, in the order of the studies, and the number of seeds of each study that was run."""

    judgments: Sequence[Judgment]
    seeds: Mapping[str, int]

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Returns header and rows of its table, with a mark at amended claims."""
        header, rows = claim_rows(self.judgments)
        for row, judgment in zip(rows, self.judgments, strict=True):
            row[-1] += "*" * bool(judgment.claim.amended)
        return header, rows

    def counts(self) -> dict[str, int]:
        """Counts the claims of each verdict."""
        return count(self.judgments)

    def markdown(self) -> str:
        """Writes the ledger as a page."""
        table = markdown_table(*self.rows())
        seeds = ", ".join(f"{study} {count}" for study, count in self.seeds.items())
        return f"# Claims: {self.summary()}\n\nSeeds: {seeds}.\n\n{table}\n{self.footnotes()}"

    def footnotes(self) -> str:
        """Lists in Markdown the changes of the rules after results had been seen."""
        notes = [f"- * {j.claim.id}: {j.claim.amended}" for j in self.judgments if j.claim.amended]
        return "\n" + "\n".join(notes) + "\n" if notes else ""

    def summary(self) -> str:
        """Writes the counts."""
        return in_words(self.counts())

    def save(self, out: Path) -> None:
        """Writes `ledger.json` and `ledger.md`."""
        document = {"schema": 2, "seeds": dict(self.seeds), "claims": [j.to_json() for j in self.judgments]}
        page = f"{self.markdown()}\n".encode(errors="replace")
        for name, content in (("ledger.json", record.write(document)), ("ledger.md", page)):
            with atomic_file(out / name) as file:
                file.write(content)


def saved_runs(directory: Path) -> tuple[dict[str, dict[Path, Results]], list[record.RecordError]]:
    """Loads the results in a directory and in those in it, by study, in the order of the studies.

    Of several runs of a study the one in the directory of its name comes first. Published results, files that are named
    for their study, are read as well. What can't be read is left out, and returned beside the others as the errors that
    say why.
    """
    saved, unreadable = {}, []
    published = (directory / f"{name}.json" for name in STUDIES)
    folders = sorted(path for path in directory.iterdir() if path.is_dir())
    for path in (directory, *folders, *(path for path in published if path.exists())):
        try:
            if results := Results.load(path):
                saved[path] = results
        except record.RecordError as error:
            unreadable.append(error)
    runs = {name: {path: results for path, results in saved.items() if results.study == name} for name in STUDIES}
    named = {name: dict(sorted(of.items(), key=lambda item: item[0].stem != name)) for name, of in runs.items() if of}
    return named, unreadable


def is_to_be_replaced(saved: Results, study: Study, choices: Sequence[Options]) -> bool:
    """Says whether a run has fewer seeds than any of the choices that it else equals, or was fast and they are not."""
    options, seeds = dict(saved.options), saved.options["seeds"]
    wanted = [choice.to_json() for choice in choices]
    if alike := [choice for choice in wanted if {**choice, "seeds": seeds} == options]:
        return all(seeds < choice["seeds"] for choice in alike)
    fast = study.options(**{**(study.fast or {}), "seeds": seeds}).to_json()
    return bool(choices and study.fast) and {**options, "dataset": None} == {**fast, "dataset": None}
