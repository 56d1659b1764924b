"""Publishes what the studies measured: `python tools/make_results.py RUNS`.

It copies `results.json`, the curves and the figures of each study's directory in RUNS to `docs/results/` and
`docs/figures/`, and writes the ledger (`docs/ledger.md`), its rules (`docs/rules.md`), what they changed
(`docs/ledger_changes.md`), the tables of `docs/results.md` and that of `docs/studies.md`. Without RUNS it judges anew
what is in `docs/results/`, and writes the pages; every number on them is in those files.
"""

import io
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bnjax.studies import STUDIES
from bnjax.studies.evidence import record
from bnjax.studies.evidence.claims import Judgment, judge, lessons, setting_text
from bnjax.studies.evidence.ledger import Ledger
from bnjax.studies.evidence.results import Results, claim_rows, markdown_table, metric_tables

DOCS = Path(__file__).parents[1] / "docs"
COLUMNS = 6  # columns of numbers in a table
JPEG = "The images of CIFAR-10 were those of a copy compressed as JPEG, not the original ones."
RULES_BLOCK = re.compile(r"(<!-- rules -->\n).*?(<!-- end -->)", re.DOTALL)
NOT_RUN = "not run yet by these rules"
UNJUDGED = "*Of a run before the present rules, by which the ledger does not judge it.*"
NOTHING_CHANGED = "No rule was changed after a result of these runs had been seen."
NOT_MEASURED = """
What the sources state and these studies cannot measure: the accuracies on ImageNet, alone and of an ensemble, the
comparison with human raters, and the number of training steps to the former state of the art (the images, and weeks of
accelerators); CIFAR-100 (its images could not be had here; `bnjax run cifar` takes them); S6.1, the accuracy of a VGG
of full width and length (an accelerator); training time in seconds (the machines did other work; S5.11 counts what a
step moves and computes); the cost and the derivative of joint whitening, beyond S3.11; and statements without a
quantity, such as that batch norm simplifies the design of a network.
"""
STUDIES_BLOCK = re.compile(r"(<!-- studies -->\n).*?(<!-- end -->)", re.DOTALL)
BLOCK = re.compile(r"(<!-- results of (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(runs: Path | None) -> None:
    """Copies the results of a directory of runs, if there is one, and writes the pages."""
    for name in STUDIES:
        if runs and (saved := Results.load(runs / name)):
            publish(runs / name, name, dict(saved.document))
        judge_anew(name)
    studies = {name: saved for name in STUDIES if (saved := published(name))}
    (DOCS / "ledger.md").write_text(ledger_page(studies))
    rules = DOCS / "rules.md"
    rules.write_text(rules_page(rules.read_text()))
    (DOCS / "ledger_changes.md").write_text(changes_page(studies))
    results = DOCS / "results.md"
    results.write_text(results_page(results.read_text(), studies))
    page = DOCS / "studies.md"
    page.write_text(studies_page(page.read_text()))


def studies_page(text: str) -> str:
    """The page of the studies with its table made anew, of what each says of itself."""
    rows = [[f"`bnjax run {study.name}`", study.summary, study.source] for study in STUDIES.values()]
    table = markdown_table(["command", "what", "source"], rows)
    return STUDIES_BLOCK.sub(lambda match: f"{match[1]}\n{table}\n\n{match[2]}", text)


def publish(run: Path, name: str, document: dict[str, Any]) -> None:
    """Copies a study's results, its curves and its figures."""
    for old in (DOCS / "figures").glob(f"{name}_*.png"):
        old.unlink()
    document["figures"] = {file: text for file, text in document["figures"].items() if "histograms" not in file}
    for file in document["figures"]:
        content = io.BytesIO()
        with Image.open(run / file) as image:
            image.convert("RGB").quantize(128).save(content, "png", optimize=True)
        (DOCS / "figures" / f"{name}_{file}").write_bytes(content.getvalue())
    with np.load(run / "curves.npz") as arrays:
        curves = {key: values for key, values in arrays.items() if "/histograms/" not in key}
    curves = {key: v.astype(np.float32) if v.dtype.kind == "f" else v for key, v in curves.items()}
    np.savez_compressed(DOCS / "results" / f"{name}.npz", **curves)
    write(name, document)


def judge_anew(name: str) -> None:
    """Writes the verdicts on a study's claims into its published results."""
    if (saved := published(name)) and is_by_these_rules(saved):
        write(name, {**saved.document, "claims": [judgment.to_json() for judgment in judged_by(name, saved)]})


def is_by_these_rules(saved: Results) -> bool:
    """Says whether a run was made after the rules were written; the numbers of others stay published, unjudged."""
    return bool(saved.document["claims"])


def judged_by(name: str, saved: Results | None) -> list[Judgment]:
    """Judges the claims of a study by its published results, if these were made by the rules."""
    claims = STUDIES[name].load().CLAIMS
    if saved and is_by_these_rules(saved):
        return judge(claims, [saved])
    return [Judgment(claim, (), NOT_RUN) for claim in claims]


def write(name: str, document: Mapping[str, Any]) -> None:
    """Writes the published results of a study."""
    (DOCS / "results" / f"{name}.json").write_bytes(record.write(document))


def published(name: str) -> Results | None:
    """Loads the published results of a study."""
    return Results.load(DOCS / "results" / f"{name}.json")


def judgments_of(studies: Mapping[str, Results]) -> list[Judgment]:
    """Judges the claims of all studies."""
    return [judgment for name in STUDIES for judgment in judged_by(name, studies.get(name))]


def ledger_page(studies: dict[str, Results]) -> str:
    """Returns the page of all claims with their verdicts, and of the runs that they come from."""
    judgments = judgments_of(studies)
    studies = {name: saved for name, saved in studies.items() if is_by_these_rules(saved)}
    ledger = Ledger(judgments, {name: len(saved.seeds) for name, saved in studies.items()})
    runs, machines = [], []
    for name, saved in studies.items():
        versions, machine = saved.document["versions"], saved.document["machine"]
        minutes = f"{saved.document['seconds'] / 60:.1f} min"
        size, source = size_of(saved.settings), STUDIES[name].source_size or "the same"
        links = f"[{name}](results/{name}.json), [curves](results/{name}.npz)"
        runs.append([links, f"`{saved.command}`", size, source])
        machines.append(
            [
                name,
                str(len(saved.seeds)),
                minutes,
                f"{machine_of(machine)}, {machine['system']}, Python {machine['python']}",
                ", ".join(f"{package} {versions[package]}" for package in ("bnjax", "jax", "flax", "optax")),
            ]
        )
    changed = ledger.footnotes()
    notes = f"Changed after results of these runs had been seen:\n{changed}" if changed else NOTHING_CHANGED
    return f"""# Ledger of claims

**{len(judgments)} statements of the sources and of later papers: {ledger.summary()}{waiting(judgments)}.**

{learned(studies)}

How a verdict is reached, and the rule, control and margin of each claim: [Rules](rules.md). What the rules before these
had said, and why they were changed: [Changes](ledger_changes.md). All figures and numbers: [Results](results.md).
`tools/make_results.py` makes this page from the runs below, `python tools/recompute_ledger.py` computes every row again
from the published files alone, and `bnjax claims` makes such a table from runs of one's own.

A row shows the mean over seeds ± half its 95 % interval (an interval in brackets where it ends at what is possible, or
where it is that of one further run), d_z, a paired difference over its standard deviation over seeds, and what the size
of the test set leaves beside the seeds. p is that of the verdict, alone → corrected for all claims that are tested on
the same study's trainings.

**What a verdict holds for is the size of the run**, which the second table shows: on a processor the convolutional
networks are narrow and trained for a short time, and say nothing of the sources' long trainings.

{markdown_table(*with_figures(ledger))}

{notes}
{NOT_MEASURED}
## The runs

{markdown_table(["study", "command", "size here", "in the source"], runs)}

{JPEG}

Every number above is computed from the values at each seed in these files. Times are those of machines that did other
work as well, and of runs that were continued from checkpoints they are those of the last part.

{markdown_table(["study", "seeds", "time", "machine", "versions"], machines)}
"""


def waiting(judgments: list[Judgment]) -> str:
    """Returns of how many claims the verdict waits for a run by the rules."""
    count = sum(judgment.reason == NOT_RUN for judgment in judgments)
    return f", of which {count} wait for a run by the present rules" if count else ""


def learned(studies: Mapping[str, Results]) -> str:
    """Returns what the judged studies teach, a paragraph for each."""
    paragraphs = []
    for name, saved in studies.items():
        sentences = lessons(str(STUDIES[name].load().__file__), judged_by(name, saved))
        paragraphs.append(f"**{name}.** {' '.join(sentences)}")
    return "\n\n".join(paragraphs)


def with_figures(ledger: Ledger) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of a ledger, each statement with links to the published figures that show it."""
    header, rows = ledger.rows()
    for row, judgment in zip(rows, ledger.judgments, strict=True):
        claim = judgment.claim
        places = {file: f"{claim.family}_{file}" for file in claim.figures}
        there = {file: place for file, place in places.items() if (DOCS / "figures" / place).exists()}
        links = [f"[{file.removesuffix('.png').replace('_', ' ')}](figures/{place})" for file, place in there.items()]
        row[1] += f" ({', '.join(links)})" * bool(links and judgment.outcomes)
    return header, rows


def rules_page(text: str) -> str:
    """Returns the page of the rules with its tables made anew."""
    tables = []
    for name, study in STUDIES.items():
        rows = []
        for claim in study.load().CLAIMS:
            needs = ", ".join(setting_text(key, value) for key, value in (claim.needs or {}).items())
            rule = f"{claim.rule}." + f" {claim.why}." * bool(claim.why)
            rows.append([claim.id, claim.statement, rule, claim.control, claim.margin, needs or "–"])
        seeds = study.fields["seeds"].default
        table = markdown_table(["claim", "statement", "rule", "control", "margin", "needs"], rows)
        tables.append(f"### {name}: {seeds} seeds, {len(rows)} claims\n\n{study.source}.\n\n{table}")
    return RULES_BLOCK.sub(lambda match: f"{match[1]}\n" + "\n\n".join(tables) + f"\n\n{match[2]}", text)


def changes_page(studies: Mapping[str, Results]) -> str:
    """Returns the page that sets the first ledger's verdicts beside those of today, with the reasons."""
    first = json.loads((DOCS / "results" / "first_ledger.json").read_text())
    rows, new = [], []
    for judgment in judgments_of(studies):
        claim, old = judgment.claim, first.get(judgment.claim.was or judgment.claim.id)
        verdict = judgment.verdict + f" ({judgment.reason})" * bool(judgment.reason)
        if old:
            name = claim.id if claim.id == (claim.was or claim.id) else f"{claim.id}, was {claim.was}"
            rows.append([name, claim.statement, old["verdict"], verdict, claim.changed or "the rule is the same"])
        else:
            new.append([claim.id, claim.statement, verdict, claim.changed.removeprefix("new: ")])
    return f"""# What the rules changed

The first ledger had {len(first)} rows. A review found rules without a control, with a training too short for what they
asked, or with an undefined word, so that all rules were written anew, before any of the runs behind [the
ledger](ledger.md). Here stand both verdicts, with what of the rule is other and why.

{markdown_table(["claim", "statement", "first verdict", "verdict now", "what changed in the rule"], rows)}

## New rows

{markdown_table(["claim", "statement", "verdict", "why"], new)}
"""


def machine_of(machine: Mapping[str, Any]) -> str:
    """Returns the processor's name and cores if they were recorded, else the device."""
    return f"{machine['processor']}, {machine['cores']} cores" if "processor" in machine else machine["devices"][0]


def size_of(settings: Mapping[str, Any]) -> str:
    """Returns the settings that say how large and long a training was, as text."""
    names = ("dataset", "network", "filters", "epochs", "steps_per_epoch", "deep_epochs", "steps", "examples")
    shown = [(name.replace("_", " "), settings[name]) for name in names if name in settings]
    return ", ".join(value if isinstance(value, str) else f"{text_of(value)} {name}" for name, value in shown)


def text_of(value: Any) -> str:
    """Formats a number with commas between thousands, or a list of such numbers."""
    return ", ".join(map(text_of, value)) if isinstance(value, list) else f"{value:,}"


def results_page(text: str, studies: dict[str, Results]) -> str:
    """Returns the page with its tables and figures made anew; the text between them stays."""

    def block(match: re.Match[str]) -> str:
        name = match[2]
        if name not in studies:
            return f"{match[1]}\nNot run yet by the present rules.\n\n{match[3]}"
        saved = studies[name]
        tables = [markdown_table(*table) for table in metric_tables(saved, COLUMNS)]
        if is_by_these_rules(saved):
            tables.append(markdown_table(*claim_rows(judged_by(name, saved))))
        else:
            tables.insert(0, UNJUDGED)
        figures = []
        for file, text in saved.document["figures"].items():
            shown_in = [judgment.claim.id for judgment in judged_by(name, saved) if file in judgment.claim.figures]
            claims = f"\n\nClaims: {', '.join(shown_in)}." if shown_in and is_by_these_rules(saved) else ""
            figures.append(f"![{text}](figures/{name}_{file}){claims}")
        return match[1] + "\n" + "\n\n".join([*tables, *figures]) + "\n\n" + match[3]

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
