"""One self-contained page: what was learned, the ledger, then each study's tables, figures and settings."""

import base64
import contextlib
import math
import struct
import sys
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bnjax._extras import needs
from bnjax.studies import STUDIES
from bnjax.studies.data import atomic_file
from bnjax.studies.data.sets import first_line
from bnjax.studies.evidence import record
from bnjax.studies.evidence.claims import Judgment, judge, lessons
from bnjax.studies.evidence.ledger import Ledger, saved_runs
from bnjax.studies.evidence.results import Results, metric_rows
from bnjax.studies.evidence.statistics import seeds_in_words

with needs("studies"):
    import jinja2

PAGE = "report.html"
"""The name of the page that a run leaves."""
_LARGEST = 2**25  # bytes of a figure
_MARKS = {"reproduced": "✓", "not reproduced": "✗", "compatible": "≈", "undecided": "?", "wrong in the source": "!"}


def write_report(run_dir: Path, out: Path) -> tuple[int, list[str]]:
    """Writes the page of a study's directory, of a directory of such, or of published results.

    Returns:
      How many runs it shows; and what it could not show, a line each, which stands on the page too.

    Raises:
      ValueError: if there are no results.
    """
    studies, unreadable = saved_runs(run_dir)
    missing = list(map(str, unreadable))
    if not studies:
        found = " ".join(missing) or f"{run_dir} has none."
        raise ValueError(f"RUN_DIR must hold results.json of a study, or directories with it. {found}")
    by_study = {name: judge(STUDIES[name].load().CLAIMS, list(runs.values())) for name, runs in studies.items()}
    judgments = [judgment for judged in by_study.values() for judgment in judged]
    shown = [(path, saved) for runs in studies.values() for path, saved in runs.items()]
    title = f"Batch norm: {next(iter(studies))}" if len(studies) == 1 else "Batch norm: the studies and their claims"
    sections = [
        _study(path, saved, by_study[saved.study], len(studies[saved.study]) > 1, missing) for path, saved in shown
    ]
    claims = [judgment.to_json() | {"p_text": judgment.p_text} for judgment in judgments]
    first = {section["study"]: section["name"] for section in reversed(sections)}
    files = {section["name"]: {figure["file"] for figure in section["figures"]} for section in sections}
    for claim in claims:  # a claim leads to the figures of the first run of its study
        claim["section"] = first[claim["family"]]
        claim["figures"] = [file for file in claim["figures"] if file in files[claim["section"]]]
    page = _template().render(
        title=title,
        counts=Ledger(judgments, {}).counts(),
        marks=_MARKS,
        claims=claims,
        learned={name: learned(name, judged) for name, judged in by_study.items() if judged},
        studies=sections,
        missing=missing,
        made_by="bnjax report",
    )
    with atomic_file(out) as file:
        file.write(page.encode(errors="replace"))
    return len(shown), missing


def learned(study: str, judged: Sequence[Judgment]) -> list[str]:
    """Returns what the judged claims of a study teach, as `lessons` does."""
    return lessons(str(STUDIES[study].load().__file__), judged)


def save_page(run_dir: Path) -> list[str]:
    """Writes `report.html` into a directory of results; returns what is wrong, in a line, where it could not."""
    page = run_dir / PAGE
    try:
        write_report(run_dir, page)
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError):  # that of earlier results
            page.unlink()
        return [f"{page} can't be saved: {first_line(error)}"]
    return []


def open_page(page: Path) -> None:
    """Opens a page in the browser, or says that it can't."""
    is_open = False
    with contextlib.suppress(webbrowser.Error, OSError):
        is_open = page.exists() and webbrowser.open(page.resolve().as_uri())
    if not is_open:
        reason = f"no browser can be had; the report is {page}" if page.exists() else "there is no report to open"
        print(f"bnjax: {record.plain(reason)}", file=sys.stderr)


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bnjax.studies.cli"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["slug"] = lambda text: text.replace(" ", "-")
    environment.filters["together"] = lambda text: text.replace(" ± ", "\u00a0±\u00a0").replace("d_z ", "d_z\u00a0")
    return environment.get_template("report.html")


def _study(
    path: Path, saved: Results, judged: Sequence[Judgment], is_one_of_several: bool, missing: list[str]
) -> dict[str, Any]:
    """Returns what the page shows of a run, and adds to what is missing."""
    study, document = STUDIES[saved.study], saved.document
    header, rows = metric_rows(saved)
    tables = [{"title": f"Measured, {seeds_in_words(len(saved.seeds))}", "header": header, "rows": rows}]
    if sizes := _sizes(document):
        tables.append({"title": "Parameters", "header": ["variant", "trainable", "batch statistics"], "rows": sizes})
    figures = []
    for file, text in document["figures"].items():
        place = _place(path, saved.study, file)
        try:
            shown_in = [judgment.claim.id for judgment in judged if file in judgment.claim.figures]
            figures.append(_figure(place, text) | {"file": file, "claims": shown_in})
        except (OSError, ValueError) as error:
            missing.append(f"figure {error}" if isinstance(error, ValueError) else f"figure {place}: {error.strerror}.")
    return {
        "name": record.plain(path.resolve().name) if is_one_of_several else study.name,
        "study": study.name,
        "summary": study.summary[0].upper() + study.summary[1:],
        "source": study.source,
        "command": saved.command,
        "tables": tables,
        "figures": figures,
        "settings": _settings(document),
    }


def _place(path: Path, study: str, file: str) -> Path:
    """Returns where a figure is: beside the record, or of published results in the directory of all figures."""
    return path / file if path.is_dir() else path.parent.parent / "figures" / f"{study}_{file}"


def _sizes(document: Mapping[str, Any]) -> list[list[str]]:
    """Counts the parameters of the networks, networks alike in one row."""
    labels: dict[tuple[int, ...], list[str]] = {}
    for variant in document["variants"].values():
        if shapes := variant.get("parameters"):
            sizes = [sum(map(math.prod, shapes.get(name, {}).values())) for name in ("params", "batch_stats")]
            labels.setdefault(tuple(sizes), []).append(variant["label"])
    return [["; ".join(names), *(f"{count:,}" for count in sizes)] for sizes, names in labels.items()]


def _settings(document: Mapping[str, Any]) -> dict[str, str]:
    machine = document["machine"]
    devices = f"{len(machine['devices'])} × {machine['devices'][0]} ({machine['backend']})"
    processor = machine["system"]
    if {"processor", "cores"} <= set(machine):
        processor = f"{machine['processor']}, {machine['cores']} cores"
    return {
        **{key.replace("_", " "): _text(value) for key, value in document["settings"].items()},
        "seeds": _text(len(document["seeds"])),
        "started": document["started"],
        "wall time": f"{document['seconds']:.0f} s",
        "machine": f"{processor}, {machine['system']}, Python {machine['python']}, {devices}",
        "versions": ", ".join(f"{package} {version}" for package, version in document["versions"].items()),
    }


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {_text(v)}" for key, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _figure(path: Path, text: str) -> dict[str, Any]:
    if path.is_symlink():
        raise record.RecordError(f"{path} is a link to another file.")
    content = record.regular_file(path, _LARGEST)
    if content[:8] != b"\x89PNG\r\n\x1a\n" or content[12:16] != b"IHDR" or len(content) < 24:
        raise record.RecordError(f"{path} is no PNG.")
    width, height = struct.unpack(">II", content[16:24])  # PNG's first chunk
    data, title = base64.b64encode(content).decode(), text.split(". ")[0]
    return {"data": data, "text": text, "title": title, "width": width, "height": height}
