"""The ledger: every claim of the sources with its verdict, from saved results; what is missing is run first."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnjax.data import DataError, atomic_file
from bnjax.studies import STUDIES, Options, Study
from bnjax.studies.claims import VERDICTS, Claim, Judgement
from bnjax.studies.results import json_text, markdown_table

_HEADER = ("claim", "statement", "published", "measured", "effect", "verdict")


class Saved:
    """A study's results, read from its `results.json`.

    Attributes:
      document: all of it.
      settings: of the study.
      seeds: which.
    """

    def __init__(self, document: Mapping[str, Any]):
        self.document = document
        self.settings: Mapping[str, Any] = document["settings"]
        self.seeds: Sequence[int] = document["seeds"]

    @classmethod
    def load(cls, directory: Path) -> "Saved | None":
        """What a directory holds; None where there is nothing, or something else."""
        return cls.read(directory / "results.json")

    @classmethod
    def read(cls, file: Path) -> "Saved | None":
        """What a file holds, alike."""
        try:
            document = json.loads(file.read_text())
            return cls(document) if document["schema"] == 2 else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def values(self, variant: str, metric: str) -> np.ndarray | None:
        """A metric of a variant at each seed; None where it was not measured."""
        return self.variants[variant][2].get(metric) if variant in self.variants else None

    @functools.cached_property
    def variants(self) -> dict[str, tuple[str, Mapping[str, Any], dict[str, np.ndarray]]]:
        """As those of `Results`."""

        def of(metric: Mapping[str, Any]) -> np.ndarray:
            return np.array([np.nan if value is None else value for value in metric["values"]], np.float64)

        return {
            name: (v["label"], v["settings"], {metric: of(entry) for metric, entry in v["metrics"].items()})
            for name, v in self.document["variants"].items()
        }


@dataclasses.dataclass(frozen=True)
class Ledger:
    """Claims with their verdicts.

    Attributes:
      judgements: in the order of the studies.
      seeds: of each study that was run.
    """

    judgements: Sequence[Judgement]
    seeds: Mapping[str, int]

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of its table."""
        rows = []
        for judgement in self.judgements:
            claim = judgement.claim
            cells = (
                claim.id,
                claim.statement,
                claim.published,
                judgement.measured,
                judgement.effect,
                judgement.verdict,
            )
            rows.append(list(cells))
        return list(_HEADER), rows

    def counts(self) -> dict[str, int]:
        """How many claims have each verdict."""
        found = [judgement.verdict for judgement in self.judgements]
        return {verdict: found.count(verdict) for verdict in VERDICTS if verdict in found}

    def markdown(self) -> str:
        """As a page."""
        table = markdown_table(*self.rows())
        seeds = ", ".join(f"{study} {count}" for study, count in self.seeds.items())
        return f"# Claims: {self.summary()}\n\nSeeds: {seeds}.\n\n{table}\n"

    def summary(self) -> str:
        """Counts as text."""
        return ", ".join(f"{count} {verdict}" for verdict, count in self.counts().items())

    def save(self, out: Path) -> None:
        """Writes `ledger.json` and `ledger.md`."""
        document = {"schema": 1, "seeds": dict(self.seeds), "claims": [j.to_json() for j in self.judgements]}
        for name, content in (("ledger.json", json_text(document)), ("ledger.md", self.markdown())):
            with atomic_file(out / name) as file:
                file.write(content.encode() + b"\n")


def claims_of(study: Study) -> tuple[Claim, ...]:
    """The claims that a study decides."""
    return study.load().CLAIMS


def make_ledger(
    names: Sequence[str],
    options_of: Callable[[Study], Sequence[Options]],
    out: Path,
    run: Callable[[Study, Options, Path], Any],
    tell: Callable[[str], Any] = print,
) -> Ledger:
    """Judges the claims of some studies, each from its results in `out / study`, run where they are missing.

    Args:
      names: of the studies.
      options_of: how a study is to be run, and how else where the data of that can't be had; nothing for a study to
        leave out.
      out: directory of the studies' directories.
      run: runs a study into a directory.
      tell: is told what is done.

    Returns:
      The ledger. The claims of a study that is left out, or whose data can't be had, are undecided, with the reason.
    """
    judgements, seeds = [], {}
    for name in names:
        study = STUDIES[name]
        choices = options_of(study)
        reason = "" if choices else "left out by --fast"
        saved = Saved.load(out / name)
        if saved and saved.document.get("options") in [options.to_json() for options in choices]:
            tell(f"{name}: results found in {out / name}")
        else:
            saved = None
            for options in choices:
                try:
                    run(study, options, out / name)
                except DataError as error:
                    reason = reason or f"not run: {error}"
                    tell(f"{name}: {error}")
                else:
                    saved = Saved.load(out / name)
                    break
        if saved:
            seeds[name] = len(saved.seeds)
            judgements += [claim.judge(saved) for claim in claims_of(study)]
        else:
            judgements += [Judgement(claim, (), reason) for claim in claims_of(study)]
    return Ledger(judgements, seeds)
