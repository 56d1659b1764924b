"""Publishes what the studies measured: `python tools/make_results.py RUNS`.

It copies `results.json` and the figures of each study's directory in RUNS to `docs/results/` and `docs/figures/`, and
writes the ledger (`docs/ledger.md`), the tables of `docs/results.md` and that of `docs/studies.md`. Without RUNS it
writes the pages anew from what is in `docs/results/`; every number on them is in those files.
"""

import io
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from bnjax.studies import STUDIES
from bnjax.studies.evidence.claims import judge
from bnjax.studies.evidence.ledger import Ledger
from bnjax.studies.evidence.results import Results, claim_rows, markdown_table, metric_tables

DOCS = Path(__file__).parents[1] / "docs"
COLUMNS = 6  # columns of numbers in a table
JPEG = "The images of CIFAR-10 were those of a copy compressed as JPEG, not the original ones."
STUDIES_BLOCK = re.compile(r"(<!-- studies -->\n).*?(<!-- end -->)", re.DOTALL)
BLOCK = re.compile(r"(<!-- results of (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(runs: Path | None) -> None:
    """Copies the results of a directory of runs, if there is one, and writes the pages."""
    for name in STUDIES:
        if runs and (saved := Results.load(runs / name)):
            publish(runs / name, name, dict(saved.document))
    studies = {name: saved for name in STUDIES if (saved := published(name))}
    (DOCS / "ledger.md").write_text(ledger_page(studies))
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
    """Copies a study's results and figures."""
    for old in (DOCS / "figures").glob(f"{name}_*.png"):
        old.unlink()
    document["figures"] = {file: text for file, text in document["figures"].items() if "histograms" not in file}
    for file in document["figures"]:
        content = io.BytesIO()
        with Image.open(run / file) as image:
            image.convert("RGB").quantize(128).save(content, "png", optimize=True)
        (DOCS / "figures" / f"{name}_{file}").write_bytes(content.getvalue())
    (DOCS / "results" / f"{name}.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def published(name: str) -> Results | None:
    """Loads the published results of a study."""
    return Results.load(DOCS / "results" / f"{name}.json")


def ledger_page(studies: dict[str, Results]) -> str:
    """Returns the page of all claims with their verdicts, and of the runs that they come from."""
    judgments = [
        judgment for name, saved in studies.items() for judgment in judge(STUDIES[name].load().CLAIMS, [saved])
    ]
    ledger = Ledger(judgments, {name: len(saved.seeds) for name, saved in studies.items()})
    runs, machines = [], []
    for name, saved in studies.items():
        versions, machine = saved.document["versions"], saved.document["machine"]
        minutes = f"{saved.document['seconds'] / 60:.1f} min"
        claimed = ", ".join(claim.id for claim in STUDIES[name].load().CLAIMS)
        size, source = size_of(saved.settings), STUDIES[name].source_size or "the same"
        runs.append([f"[{name}](results/{name}.json)", claimed, f"`{saved.command}`", size, source])
        machines.append(
            [
                name,
                str(len(saved.seeds)),
                minutes,
                f"{machine_of(machine)}, {machine['system']}, Python {machine['python']}",
                ", ".join(f"{package} {versions[package]}" for package in ("bnjax", "jax", "flax", "optax")),
            ]
        )
    return f"""# Ledger of claims

**{len(judgments)} statements of the sources: {ledger.summary()}.**

`tools/make_results.py` makes this page from the runs below, and `bnjax claims` such a table from runs of
one's own.

A claim's rule was fixed before its run (but for those marked with an asterisk): which quantity of which networks
decides, and the range in which the 95 % confidence interval of its mean over seeds (Student's t) has to lie. It is
*reproduced* where the whole interval lies there, *not reproduced* where none of it does, and *undecided* at this number
of seeds else, or where the claim needs a longer run than this one. Differences are paired over seeds; d is such a
difference over its standard deviation over seeds. Numbers in brackets are the 95 % prediction interval of one run,
which has to hold the published number.

**What a verdict holds for is the size of the run**, which the second table shows: on a processor the convolutional
networks are narrow and trained for a short time, and say nothing of the sources' long trainings.

{markdown_table(*ledger.rows())}

Changed after results had been seen:
{ledger.footnotes()}
## The runs

{markdown_table(["study", "claims", "command", "size here", "in the source"], runs)}

{JPEG}

Every number above is computed from the values at each seed in these files. Times are those of machines that did other
work as well, and of runs that were continued from checkpoints they are those of the last part.

{markdown_table(["study", "seeds", "time", "machine", "versions"], machines)}

What was measured beside the claims, with all figures: [Results](results.md).
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
            return match[0]
        saved = studies[name]
        tables = [markdown_table(*table) for table in metric_tables(saved, COLUMNS)]
        tables.append(markdown_table(*claim_rows(judge(STUDIES[name].load().CLAIMS, [saved]))))
        figures = [f"![{text}](figures/{name}_{file})" for file, text in saved.document["figures"].items()]
        return match[1] + "\n" + "\n\n".join([*tables, *figures]) + "\n\n" + match[3]

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
