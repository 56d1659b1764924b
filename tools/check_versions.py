"""Runs the core tests with each supported version of JAX: `python tools/check_versions.py [JAX …]`.

For each of the versions below it makes a virtual environment with the Flax of its time, installs bnjax there without
extras, and runs the tests of the function, layers, variants, training and measurements, some eight minutes each on two
cores. What came out is saved in docs/versions.json, from which the table of docs/versions.md is made. Given versions
(or 'lowest') are run alone, and take the place of their rows.
"""

import argparse
import json
import re
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from environments import ROOT, environment

RECORD, PAGE = ROOT / "docs" / "versions.json", ROOT / "docs" / "versions.md"
BLOCK = re.compile(r"(<!-- versions -->\n).*?(<!-- end -->)", re.DOTALL)


class Row(NamedTuple):
    """An environment: the version of Python, and what pip installs beside bnjax."""

    python: str
    requirements: tuple[str, ...]


ROWS = {
    "0.7.2": Row("3.13", ("jax==0.7.2", "flax==0.11.2")),
    "0.8": Row("3.11", ("jax==0.8.3", "flax==0.12.2")),
    "0.9": Row("3.12", ("jax==0.9.2", "flax==0.12.6")),
    "0.10": Row("3.11", ("jax==0.10.2", "flax==0.12.8")),
    "0.11": Row("3.12", ("jax==0.11.2", "flax==0.12.10")),
    "0.12": Row("3.13", ("jax==0.12.*", "flax==0.12.12")),
    "lowest": Row("3.11", ()),  # of all that the base needs
}
GROUPS = {
    "function": ("norm", "moments"),
    "layers": ("linen", "nnx"),
    "variants": ("variants", "renorm", "statistics_variants"),
    "training": ("parallel", "train"),
    "measurements": ("analysis", "losses"),
}
SHOWN = ("python", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


def main() -> int:
    """Runs the rows, and writes record and page; returns how many rows have failures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", metavar="JAX", help=f"which to run, of {', '.join(ROWS)} (default all)")
    parser.add_argument("--python", metavar="X.Y", help="interpreter to use (default one for each, see the table)")
    parser.add_argument("--processes", default="auto", metavar="N", help="of the tests (default as many as cores)")
    parser.add_argument("--page", action="store_true", help="only make the page anew from the record")
    options = parser.parse_args()
    if unknown := [version for version in options.versions if version not in ROWS]:
        parser.error(f"unknown versions {', '.join(unknown)}; there are {', '.join(ROWS)}")
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    chosen = [] if options.page else options.versions or list(ROWS)
    for version in chosen:
        print(f"{version}: installing", flush=True)
        record[version] = run(ROWS[version], options.python, options.processes)
        print(f"{version}: {json.dumps(record[version])}", flush=True)
        RECORD.write_text(json.dumps({name: record[name] for name in ROWS if name in record}, indent=2) + "\n")
    PAGE.write_text(page(PAGE.read_text(), record))
    return sum(any(counts["failed"] for counts in record[version]["groups"].values()) for version in chosen)


def run(row: Row, python: str | None, processes: str) -> dict[str, Any]:
    """Versions that were installed, tests of each group by outcome, and the reasons of those that were skipped."""
    names = [f"tests/test_{name}.py" for group in GROUPS.values() for name in group]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = row.requirements or [re.sub(">=", "==", text) for text in project["dependencies"]]
    tools = [
        text for text in project["optional-dependencies"]["test"] if re.match(r"pytest|hypothesis|beartype|chex", text)
    ]
    with environment(python or row.python) as made, tempfile.TemporaryDirectory() as directory:
        made.pip("install", str(ROOT), *requirements, *tools)
        path = Path(directory) / "tests.xml"
        command = [
            "python",
            "-m",
            "pytest",
            "-q",
            "-n",
            processes,
            "-p",
            "no:cacheprovider",
            f"--junitxml={path}",
            *names,
        ]
        done = made.run(*command, env={**made.variables, "PYTHONDONTWRITEBYTECODE": "1"})
        if not path.exists():
            sys.exit(done.stdout + done.stderr)
        versions = {
            "python": made.run("python", "-c", "import platform; print(platform.python_version())").stdout.strip()
        }
        versions |= {name: version for name, version in made.versions().items() if name in SHOWN}
        groups = {group: {"passed": 0, "failed": 0, "skipped": 0} for group in GROUPS}
        skips, failures = Counter(), []
        for case in ElementTree.parse(path).iter("testcase"):
            stem = case.attrib["classname"].split(".")[1].removeprefix("test_")
            outcome = {child.tag for child in case}
            kind = "skipped" if "skipped" in outcome else "failed" if outcome & {"failure", "error"} else "passed"
            groups[next(group for group, stems in GROUPS.items() if stem in stems)][kind] += 1
            if kind == "skipped":
                skips[case.find("skipped").attrib["message"]] += 1
            if kind == "failed":
                failures.append(f"{stem}::{case.attrib['name']}")
        return {"versions": versions, "groups": groups, "skipped": dict(skips), "failures": failures}


def page(text: str, record: dict[str, Any]) -> str:
    """The page with the table of a record."""
    return BLOCK.sub(lambda match: f"{match[1]}{table(record)}{match[2]}", text)


def table(record: dict[str, Any]) -> str:
    """Markdown of the versions and of the tests that passed; what failed or was skipped is said below."""
    lines = [f"| {' | '.join([*SHOWN, *GROUPS])} |", f"|{'---|' * (len(SHOWN) + len(GROUPS))}"]
    notes = []
    for name, row in record.items():
        counts = row["groups"].values()
        cells = [", ".join(f"{count} {kind}" for kind, count in c.items() if count) for c in counts]
        lines.append(f"| {' | '.join([*(row['versions'][key] for key in SHOWN), *cells])} |")
        where = f"- jax {row['versions']['jax']} with flax {row['versions']['flax']}"
        where += " (the lowest versions of everything)" if name == "lowest" else ""
        notes += [f"{where}: {count} skipped: {reason}." for reason, count in row["skipped"].items()]
        notes += [f"{where}: failed: `{failure}`." for failure in row["failures"]]
    return "\n".join([*lines, "", *notes, ""])


if __name__ == "__main__":
    sys.exit(main())
