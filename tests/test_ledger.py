"""The published ledger: it can be computed again from the published files alone, and stands on runs by its rules."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bnjax.studies import STUDIES
from bnjax.studies.evidence.claims import lessons
from bnjax.studies.evidence.results import Results

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "docs" / "results"


def recompute(directory, *arguments):
    command = [sys.executable, str(ROOT / "tools" / "recompute_ledger.py"), str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def judged():
    """The published results that the rules judge, by study."""
    found = {name: Results.load(PUBLISHED / f"{name}.json") for name in STUDIES}
    return {name: saved for name, saved in found.items() if saved and saved.document["claims"]}


def test_the_ledger_computed_again_without_the_package_is_the_same():
    ended = recompute(PUBLISHED)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("all agree") == len(judged()) >= 4
    assert "bnjax" not in (ROOT / "tools" / "recompute_ledger.py").read_text().replace("bnjax.studies", "")


@pytest.mark.parametrize("change", ["a seed's value", "a verdict", "a p-value", "a curve's metric", "a need"])
def test_what_was_tampered_with_is_found(tmp_path, change):
    for file in ("circles.json", "circles.npz"):
        shutil.copy(PUBLISHED / file, tmp_path)
    document = json.loads((tmp_path / "circles.json").read_text())
    claim = next(claim for claim in document["claims"] if claim["id"] == "S1.5")
    metrics = document["variants"]["after"]["metrics"]
    if change == "a seed's value":
        metrics["test_accuracy"]["values"][3] += 0.01
    elif change == "a verdict":
        claim["verdict"] = "undecided"
    elif change == "a p-value":
        claim["p_corrected"] *= 2
    elif change == "a curve's metric":
        metrics["epochs_to_80_percent"]["values"][0] += 1
    else:
        document["settings"]["epochs"] = 99
    (tmp_path / "circles.json").write_text(json.dumps(document))
    ended = recompute(tmp_path)
    assert ended.returncode == 1 and "circles" in ended.stdout and not ended.stderr


def test_a_directory_that_is_not_there_is_one_line():
    ended = recompute(ROOT / "nowhere")
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", judged())
def test_published_runs_have_the_seeds_that_were_fixed_and_lessons_that_hold(name):
    saved, study = judged()[name], STUDIES[name]
    assert len(saved.seeds) == study.fields["seeds"].default
    assert not [claim["id"] for claim in saved.document["claims"] if claim["amended"]]
    module = study.load()
    saved.judge(module.CLAIMS)
    assert len(lessons(module.__file__, saved.claims)) == 3
    for claim in module.CLAIMS:
        assert set(claim.figures) <= set(saved.document["figures"])
