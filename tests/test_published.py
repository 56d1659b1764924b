"""The published results, read from the package."""

import json
import tomllib
from pathlib import Path

import pytest

from bnjax.studies import STUDIES
from bnjax.studies.cli import notebook
from bnjax.studies.evidence import Results, results
from bnjax.studies.evidence.record import RecordError

ROOT = Path(__file__).parents[1]


def test_the_wheel_has_each_study_that_is_published():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    published = {name for name in STUDIES if (results.SOURCES / f"{name}.json").is_file()}
    expected = {f"docs/results/{name}.json": f"bnjax/studies/published/{name}.json" for name in published}
    assert wheel["force-include"] == expected


@pytest.mark.parametrize("installed", [False, True])
def test_published_results_are_those_of_the_files(installed, tmp_path, monkeypatch):
    if installed:
        (tmp_path / "circles.json").write_bytes((results.SOURCES / "circles.json").read_bytes())
        monkeypatch.setattr(results, "PUBLISHED", tmp_path)
    document = json.loads((results.SOURCES / "circles.json").read_text())
    found = Results.published("circles")
    values = document["variants"]["after"]["metrics"]["test_accuracy"]["values"]
    assert found.metric("after", "test_accuracy").tolist() == values
    shown = notebook.published("circles", "S1.5").data
    (claim,) = [claim for claim in document["claims"] if claim["id"] == "S1.5"]
    assert shown.splitlines()[2].startswith("| S1.5 |") and claim["verdict"] in shown and len(shown.splitlines()) == 3
    assert len(notebook.published("circles").data.splitlines()) == 2 + len(document["claims"])


def test_what_is_not_published_is_said():
    with pytest.raises(RecordError, match=r"No results of 'none' are published, but those of circles, "):
        Results.published("none")
    with pytest.raises(ValueError, match=r"ids must be among S1\.1, .*, got S9\.9"):
        notebook.published("circles", "S9.9")
