"""Statements about batch norm as data: what is claimed, the conditions that decide it, and the verdict."""

import dataclasses
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from bnjax._extras import needs as needs_extra
from bnjax.studies.evidence.conditions import LEVEL, Condition, Outcome, Text
from bnjax.studies.evidence.statistics import holm

with needs_extra("studies"):
    import msgspec
    from msgspec import Meta, Struct

VERDICTS = ("reproduced", "not reproduced", "compatible", "undecided", "wrong in the source")


class AtLeast(Struct, frozen=True, forbid_unknown_fields=True):
    """A setting that a claim needs to be so large, such as the number of steps."""

    at_least: int | float

    def __str__(self) -> str:
        return f"of at least {self.at_least:,}"


class Claim(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A statement of a source.

    Attributes:
      id: its name in the ledger, such as 'S1.1'.
      source: the document, and the place in it.
      statement: the statement in our words.
      published: the number published, or a dash.
      rule: what decides, in words, fixed before the run.
      control: what the networks are compared with, such as the same comparison without batch norm.
      margin: how large a difference counts, and why.
      why: the reason for the rule, where it is not plain.
      conditions: the conditions that decide; all of them have to be met.
      needs: settings that the run must have had; numbers may be `AtLeast`.
      figures: the files of the figures that show it.
      family: the claims with which its p-value is corrected, those of one study.
      changed: what of the rule is other than in the first ledger, and why; empty where nothing is.
      was: its name in the first ledger, where that was another.
      amended: what of the rule was changed after results of these runs had been seen, and why.
      is_arithmetic: whether the statement can be checked without a run; if it fails, the source is wrong.
    """

    id: Text
    source: str = ""
    statement: Text
    published: Text = "–"
    rule: Text
    control: Text
    margin: Text
    why: str = ""
    conditions: Annotated[tuple[Condition, ...], Meta(min_length=1)]
    needs: dict[str, AtLeast | bool | int | float | str] | None = None
    figures: tuple[str, ...] = ()
    family: str = ""
    changed: str = ""
    was: str = ""
    amended: str = ""
    is_arithmetic: bool = False

    def lacks(self, results: Any) -> list[str]:
        """Returns what the claim needs that a run did not have, in words."""
        needs = (self.needs or {}).items()
        return [setting_text(key, value) for key, value in needs if not _meets(results.settings.get(key), value)]

    def judge(self, results: Any) -> "Judgment":
        """Returns the verdict on a study's `bnjax.studies.evidence.results.Results`, alone, without correction."""
        if lacks := self.lacks(results):
            return Judgment(self, (), "needs " + ", ".join(lacks))
        return Judgment(self, tuple(condition.judge(results) for condition in self.conditions))


@dataclasses.dataclass(frozen=True)
class Judgment:
    """A claim and the outcome of each of its conditions; none where the run can't decide it, for a reason in words.

    `corrected` is the p-value of the verdict, corrected for all claims that are tested in its family.
    """

    claim: Claim
    outcomes: tuple[Outcome, ...]
    reason: str = ""
    corrected: float = math.nan

    @property
    def p(self) -> float:
        """The p-value of the verdict, as if the claim were alone; NaN where nothing is tested.

        That of a claim is the largest of its conditions', as all have to be met; that of its contrary the smallest,
        times their number, as one that fails is enough. The smaller of the two counts.
        """
        return min(self._p) if self._p else math.nan

    @property
    def _p(self) -> tuple[float, float] | None:
        tested = [outcome for outcome in self.outcomes if outcome.condition.kind != "exact"]
        has_failed = any(outcome.met is False for outcome in self.outcomes if outcome.condition.kind == "exact")
        if not tested or has_failed or not all(outcome.measured.n for outcome in self.outcomes):
            return None
        against = min(1.0, len(tested) * min(outcome.p_against for outcome in tested))
        return max(outcome.p_for for outcome in tested), against

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`.

        'reproduced' if every condition is met and 'not reproduced' if one fails, by p-values that stay below 5 % when
        they are corrected for the family; 'compatible' if the published numbers may be those of one further run; else
        'undecided'. What is exact is met or not.
        """
        exact = [outcome.met for outcome in self.outcomes if outcome.condition.kind == "exact"]
        if False in exact:
            return "wrong in the source" if self.claim.is_arithmetic else "not reproduced"
        if self._p is None:
            return "reproduced" if exact and all(exact) and len(exact) == len(self.outcomes) else "undecided"
        p_for, p_against = self._p
        p = self.p if math.isnan(self.corrected) else self.corrected
        if p < LEVEL:
            return "reproduced" if p_for < p_against else "not reproduced"
        is_one_run = all(outcome.condition.kind == "one run" for outcome in self.outcomes)
        return "compatible" if is_one_run and all(outcome.met is not None for outcome in self.outcomes) else "undecided"

    @property
    def measured(self) -> str:
        """The numbers that decide, for the ledger."""
        return self.reason or "; ".join(outcome.text for outcome in self.outcomes)

    @property
    def p_text(self) -> str:
        """Both p-values, 'alone → corrected', for the ledger; a dash where nothing is tested."""
        if math.isnan(self.p):
            return "–"
        corrected = self.p if math.isnan(self.corrected) else self.corrected
        return f"{_p_text(self.p)} → {_p_text(corrected)}"

    def to_json(self) -> dict[str, Any]:
        """Returns the entry in `results.json`."""
        claim = msgspec.to_builtins(self.claim)
        claim["needs"] = {key: str(value) for key, value in (self.claim.needs or {}).items()}
        for condition, outcome in zip(claim["conditions"], self.outcomes, strict=False):
            measured = {"mean": outcome.measured.mean, "ci95": outcome.measured.half, "n": outcome.measured.n}
            own = ("effect", "p_for", "p_against", "met", "test_set")
            condition["published_effect"] = condition.pop("effect")
            condition |= measured | {"interval": [outcome.low, outcome.high]} | {k: getattr(outcome, k) for k in own}
        claim["conditions"] = claim["conditions"][: len(self.outcomes)]
        verdict = {"measured": self.measured, "p": self.p, "p_corrected": self.corrected, "verdict": self.verdict}
        return claim | verdict


def judge(claims: Sequence[Claim], runs: Sequence[Any]) -> list[Judgment]:
    """Returns the verdicts on the claims of one study, its family, whose p-values are corrected together.

    Of several runs each claim is judged by the one that has what it needs, and of these by that of the most seeds, then
    by the first: by what a run is, and not by what it gave.
    """
    judged = []
    for claim in claims:
        able = [run for run in runs if not claim.lacks(run)]
        measured = [run for run in able if all(c.values(run) is not None for c in claim.conditions)]
        judged.append(claim.judge(max(measured or able or runs, key=lambda run: len(run.seeds))))
    tested = [judgment for judgment in judged if not math.isnan(judgment.p)]
    corrected = dict(zip(map(id, tested), holm([judgment.p for judgment in tested]), strict=True))
    return [dataclasses.replace(judgment, corrected=corrected.get(id(judgment), math.nan)) for judgment in judged]


def _p_text(p: float) -> str:
    return f"{p:.2f}" if p >= 0.095 else f"{p:.3f}" if p >= 0.00095 else "<0.001"


def setting_text(key: str, value: Any) -> str:
    """Writes a setting and its value, such as 'epochs of at least 20'."""
    text = key.replace("_", " ")
    return text if value is True else f"not {text}" if value is False else f"{text} {value}"


def _meets(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, AtLeast):
        return isinstance(value, int | float) and value >= wanted.at_least
    return value == wanted


class Lesson(Struct, frozen=True, forbid_unknown_fields=True):
    """A sentence on what a study teaches, and the verdicts that it rests on, by claim."""

    text: Text
    rests_on: dict[str, Text]


class _Source(Struct, frozen=True, forbid_unknown_fields=True):
    """Claims of one document, and what they need where they have no needs of their own."""

    name: Text
    claims: list[Claim]
    needs: dict[str, AtLeast | bool | int | float | str] = {}


class _Claims(Struct, frozen=True, forbid_unknown_fields=True):
    """A file of claims, and what was learned of them."""

    sources: list[_Source]
    learned: list[Lesson] = []


def lessons(study_file: str, judgments: Sequence[Judgment]) -> list[str]:
    """Returns what the judged claims of a study teach, in a few sentences.

    They are those that stand beside the claims as `[[learned]]`, each with the verdicts that it rests on, of which only
    those are returned whose verdicts these are. Without any, the verdicts are counted.
    """
    path, verdicts = _beside(study_file), {judgment.claim.id: judgment.verdict for judgment in judgments}
    learned = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), _Claims).learned if path.exists() else []
    found = [lesson.text for lesson in learned if lesson.rests_on.items() <= verdicts.items()]
    return found or [f"Of {len(verdicts)} claims, {in_words(count(judgments))}."]


def count(judgments: Sequence[Judgment]) -> dict[str, int]:
    """Counts the claims of each verdict."""
    verdicts = [judgment.verdict for judgment in judgments]
    return {verdict: verdicts.count(verdict) for verdict in VERDICTS if verdict in verdicts}


def in_words(counts: Mapping[str, int]) -> str:
    """Writes counts of verdicts."""
    return ", ".join(f"{number} {verdict}" for verdict, number in counts.items())


def _beside(study_file: str) -> Path:
    path = Path(study_file)
    return path.parent / "claims" / f"{path.stem}.toml"


def read_claims(study_file: str, text: str | None = None) -> tuple[Claim, ...]:
    """Reads the claims of a study from TOML: tables `[[sources]]`, each with tables `[[sources.claims]]`.

    A source has a `name` and the `needs` of its claims, where these have none of their own. The keys of a claim are the
    attributes of `Claim`, those of its conditions the attributes of `Condition`; `published` is a dash by default. In
    `needs` the value `{at_least = 500}` is a number that may be larger, and `digits = "auto"` shows as many decimals as
    the interval leaves. Tables `[[learned]]` are for `lessons`.

    Args:
      study_file: the file of the study's module. Its claims are in `claims/<study>.toml` beside it.
      text: the claims, where the module holds them itself.

    Raises:
      ValueError: for claims that are not so; the message names file, claim and field.
    """
    path = Path(study_file)
    if text is None:
        path = _beside(study_file)
        text = path.read_text(encoding="utf-8")
    try:
        document = tomllib.loads(text)
        sources = msgspec.convert(document, _Claims).sources
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}.") from None
    except msgspec.ValidationError as error:
        raise ValueError(f"{path}, {_place(document, str(error))}.") from None
    claims: dict[str, Claim] = {}
    for source in sources:
        for claim in source.claims:
            if claim.id in claims:
                raise ValueError(f"{path}, claim {claim.id}: id must be that of one claim only.")
            needs = source.needs if claim.needs is None else claim.needs
            claims[claim.id] = msgspec.structs.replace(claim, source=source.name, needs=needs, family=path.stem)
    return tuple(claims.values())


def _place(document: Mapping[str, Any], text: str) -> str:
    """Says which claim and field a message speaks of, whose end is a path such as '$.sources[0].claims[3].rule'."""
    problem, _, path = text.partition(" - at ")
    problem, path = problem[:1].lower() + problem[1:], path.strip("`$.")
    found = re.match(r"sources\[(\d+)\]\.claims\[(\d+)\]\.?(.*)", path)
    if not found:
        return f"{path or 'the file'}: {problem}"
    claim = document["sources"][int(found[1])]["claims"][int(found[2])]
    name = claim.get("id", f"number {int(found[2]) + 1}") if isinstance(claim, Mapping) else claim
    return ", ".join(filter(None, (f"claim {name}", found[3]))) + f": {problem}"
