"""Runs the core tests with each supported version of JAX: `python tools/check_versions.py [JAX …]`.

For each of the versions below it makes a virtual environment with the Flax of its time, installs bnjax there without
extras, and runs the tests of the function, layers, variants, training and measurements, some eight minutes each on two
cores. The row 'lowest' has the lowest version of everything that bnjax and its extras ask for, and runs the tests of
the extras too. The results are saved in docs/versions.json, from which the table of docs/versions.md is made. Versions
named on the command line are run alone, and take the place of their rows.
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

from environments import ROOT, environment, find_python

RECORD, PAGE = ROOT / "docs" / "versions.json", ROOT / "docs" / "versions.md"
BLOCK = re.compile(r"(<!-- versions -->\n).*?(<!-- end -->)", re.DOTALL)
LOWEST = "lowest"


class Row(NamedTuple):
    """An environment: the version of Python, and what pip installs beside bnjax."""

    python: str
    requirements: tuple[str, ...] = ()


ROWS = {
    "0.7.2": Row("3.13", ("jax==0.7.2", "flax==0.11.2")),
    "0.8": Row("3.11", ("jax==0.8.3", "flax==0.12.2")),
    "0.9": Row("3.12", ("jax==0.9.2", "flax==0.12.6")),
    "0.10": Row("3.11", ("jax==0.10.2", "flax==0.12.8")),
    "0.11": Row("3.12", ("jax==0.11.2", "flax==0.12.10")),
    "0.12": Row("3.13", ("jax==0.12.*", "flax==0.12.12")),
    "newest Python": Row("3.14", ("jax==0.12.*", "flax==0.12.12")),
    LOWEST: Row("3.11"),
}
GROUPS = {
    "function": ("norm", "moments"),
    "layers": ("linen", "nnx"),
    "variants": ("variants", "renorm", "statistics_variants"),
    "training": ("parallel", "training", "functional", "accumulation"),
    "measurements": ("analysis", "losses"),
    "extras": ("analysis_plots", "checkpoint", "cli", "data", "logs", "report"),
}
SHOWN = ("python", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


def main() -> int:
    """Runs the rows, and writes record and page; returns how many rows have failures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "versions", nargs="*", metavar="JAX", help=f"versions to run, of {', '.join(ROWS)} (default all)"
    )
    parser.add_argument("--python", metavar="X.Y", help="interpreter to use (default one for each, see the table)")
    parser.add_argument(
        "--processes", default="auto", metavar="N", help="processes of the tests (default as many as cores)"
    )
    parser.add_argument("--page", action="store_true", help="only make the page anew from the record")
    options = parser.parse_args()
    if unknown := [version for version in options.versions if version not in ROWS]:
        parser.error(f"unknown versions {', '.join(unknown)}; there are {', '.join(ROWS)}")
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    versions = [] if options.page else options.versions or list(ROWS)
    for version in list(versions):
        if not options.versions and find_python(options.python or ROWS[version].python) is None:
            print(f"{version}: left as it was, as Python {ROWS[version].python} is not here")
            versions.remove(version)
            continue
        print(f"{version}: installing, then testing", flush=True)
        record[version] = run(version, options.python or ROWS[version].python, options.processes)
        print(f"{version}: {json.dumps(record[version])}", flush=True)
        RECORD.write_text(json.dumps({name: record[name] for name in ROWS if name in record}, indent=2) + "\n")
    PAGE.write_text(page(PAGE.read_text(), record))
    return sum(bool(record[version]["failed"]) for version in versions)


def run(version: str, python: str, processes: str) -> dict[str, Any]:
    """Tests a version; returns what was installed, passed tests of each group, and failed and skipped tests by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed, options = (
        [*project["dependencies"], *extras["test"]],
        ["-p", "no:cacheprovider", "-m", "not slow and not tpu_compiler"],
    )
    stems = [stem for group in GROUPS for stem in GROUPS[group] if version == LOWEST or group != "extras"]
    if version == LOWEST:
        wanted = ("plots", "explore", "data", "studies", "safetensors", "tensorboard")
        needed += [text for extra in wanted for text in extras[extra]]
        requirements = [text.partition(";")[0].replace(">=", "==") for text in needed if ">=" in text]
        options += ["-o", "filterwarnings=default"]  # the old packages warn of each other
    else:
        tools = re.compile("pytest|hypothesis|beartype|chex")
        requirements = [*ROWS[version].requirements, *filter(tools.match, extras["test"])]
    with environment(python) as made, tempfile.TemporaryDirectory() as directory:
        made.pip("install", str(ROOT), *requirements)
        results = Path(directory) / "tests.xml"
        files = [f"tests/test_{stem}.py" for stem in stems]
        done = made.run("python", "-m", "pytest", "-n", processes, *options, f"--junitxml={results}", *files)
        if not results.exists():
            sys.exit(done.stdout + done.stderr)
        code = "import platform; print(platform.python_version())"
        versions = {**made.versions(), "python": made.run("python", "-c", code).stdout.strip()}
        cases = list(ElementTree.parse(results).iter("testcase"))
    passed, skipped, failed = dict.fromkeys(GROUPS, 0), Counter(), []
    for case in cases:
        outcomes = {child.tag: child.attrib.get("message", "") for child in case}
        stem = case.attrib["classname"].removeprefix("tests.").partition(".")[0].removeprefix("test_")
        if "skipped" in outcomes:
            skipped[outcomes["skipped"]] += 1
        elif outcomes.keys() & {"failure", "error"}:
            failed.append(f"{stem}::{case.attrib['name']}")
        else:
            passed[next(group for group, stems in GROUPS.items() if stem in stems)] += 1
    installed = {name: versions[name] for name in SHOWN}
    return {"versions": installed, "passed": passed, "skipped": dict(skipped), "failed": failed}


def page(text: str, record: dict[str, Any]) -> str:
    """Returns the page with the table of a record."""
    return BLOCK.sub(lambda match: f"{match[1]}{table(record)}{match[2]}", text)


def table(record: dict[str, Any]) -> str:
    """Returns Markdown of the versions and of the numbers of passed tests, with failed and skipped tests below."""
    lines = [f"| {' | '.join([*SHOWN, *GROUPS])} |", f"|{'---|' * (len(SHOWN) + len(GROUPS))}"]
    notes = []
    for name, row in record.items():
        versions = row["versions"]
        counts = [str(count or "") for count in row["passed"].values()]
        lines.append(f"| {' | '.join([*(versions[key] for key in SHOWN), *counts])} |")
        where = f"jax {versions['jax']} with flax {versions['flax']}, Python {versions['python']}"
        where = f"- {'Everything at its lowest version, ' if name == LOWEST else ''}{where}"
        notes += [f"{where}: {count} skipped ({reason})." for reason, count in row["skipped"].items()]
        notes += [f"{where}: `{test}` fails." for test in row["failed"]]
    return "\n".join([*lines, "", *notes, ""])


if __name__ == "__main__":
    sys.exit(main())
