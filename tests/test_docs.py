"""The examples of README and docstrings run as printed."""

import doctest
import importlib
import importlib.util
import json
import os
import pkgutil
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax

ROOT = Path(__file__).parents[1]
MODULES = [m.name for m in pkgutil.walk_packages(bnjax.__path__, "bnjax.") if not m.name.endswith("__main__")]
PEERS = {f"bnjax.convert.{peer}": peer for peer in ("equinox", "keras")}  # whose examples use what may be missing
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize("name", ["bnjax", *MODULES])
def test_docstrings(name):
    if name in PEERS:
        os.environ["KERAS_BACKEND"] = "jax"
        pytest.importorskip(PEERS[name])
    module = importlib.import_module(name)
    given = {"jax": jax, "jnp": jnp, "np": np}
    assert doctest.testmod(module, extraglobs=given, optionflags=FLAGS).failed == 0


def test_enough_docstrings_have_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = [t for name in MODULES for t in finder.find(importlib.import_module(name)) if t.examples]
    assert len(tests) >= 10


GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
PAGES = ["README.md", "docs/gallery.md", *(str(path.relative_to(ROOT)) for path in GUIDES)]
LONG = ("reinforcement_learning", "domain_adaptation", "large_batches", "small_batches", "measure", "mistakes")
LONG_PAGES = ["docs/gallery.md", *(f"docs/guides/{name}.md" for name in LONG)]


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.exhaustive if page in LONG_PAGES else ()) for page in PAGES]
)
def test_pages(page):
    source = (ROOT / page).read_text()
    code = "\n".join(block.split("```")[0] for block in source.split("```python\n")[1:])
    assert code.count(">>>") >= 5
    test = doctest.DocTestParser().get_doctest(code, {}, page, page, 0)
    assert doctest.DocTestRunner(optionflags=FLAGS).run(test).failed == 0


def test_the_migration_guide_of_equinox():
    pytest.importorskip("equinox")
    source = (ROOT / "docs" / "guides" / "migrate.md").read_text()
    first, block = (source.split(fence)[1].split("```")[0] for fence in ("```python\n", "```py\n"))
    code = f"{first}\n>>> from bnjax import convert\n\n{block}"
    test = doctest.DocTestParser().get_doctest(code, {}, "migrate.md", None, 0)
    assert len(test.examples) > 12
    assert doctest.DocTestRunner(optionflags=FLAGS).run(test).failed == 0


def test_every_public_module_has_its_place_in_the_reference():
    shown = [
        line.removeprefix("::: ").strip()
        for path in (ROOT / "docs" / "api").glob("*.md")
        for line in path.read_text().splitlines()
        if line.startswith(":::")
    ]
    assert len(shown) == len(set(shown))
    # The modules of these are shown, in place of them.
    packages = {f"bnjax.{name}" for name in ("analysis", "convert", "inference", "models", "variants")}
    studies = {name for name in MODULES if name.startswith("bnjax.studies.")}  # of which the pieces are shown
    private = {name for name in MODULES if any(part.startswith("_") for part in name.split("."))}
    assert set(MODULES) - packages - studies - private <= set(shown) <= set(MODULES)


def script(path):
    """A module made of a file that belongs to no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_versions_shows_its_record(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    tool = script(ROOT / "tools" / "check_versions.py")
    record, text = json.loads(tool.RECORD.read_text()), tool.PAGE.read_text()
    assert text == tool.page(text, record), "it is made by: python tools/check_versions.py --page"
    assert list(record) == list(tool.ROWS)
    assert all((ROOT / "tests" / f"test_{stem}.py").exists() for stems in tool.GROUPS.values() for stem in stems)
    assert not any(row["failed"] for row in record.values())


def test_the_page_of_compositions_shows_its_record():
    compositions = pytest.importorskip("compositions")
    tool = script(ROOT / "tools" / "check_compositions.py")
    record = json.loads(tool.RECORD.read_text())
    assert tool.PAGE.read_text() == tool.page(record), "it is made by: python tools/check_compositions.py --page"
    assert list(record["cells"]) == [*compositions.FLAX, *compositions.ROWS]
    assert record["other"] == {f"{row}, {column}": why for (row, column), why in compositions.OTHER.items()}
    for name, cells in record["cells"].items():
        row = {**compositions.FLAX, **compositions.ROWS}[name]
        assert list(cells) == [c for c in compositions.COLUMNS if row.normalizes or c != "export, inference"]
        wrong = {f"{name}, {column}" for column, found in cells.items() if found != tool.RIGHT}
        assert name in compositions.FLAX or wrong <= set(record["other"])


def test_published_pages_show_the_published_records():
    pages = script(ROOT / "tools" / "make_results.py")
    studies = {name: saved for name in pages.STUDIES if (saved := pages.published(name))}
    assert studies
    again = "it is made by: python tools/make_results.py"
    assert (ROOT / "docs" / "ledger.md").read_text() == pages.ledger_page(studies), again
    text = (ROOT / "docs" / "results.md").read_text()
    assert text == pages.results_page(text, studies), again
    text = (ROOT / "docs" / "studies.md").read_text()
    assert text == pages.studies_page(text), again
    assert all(f"bnjax run {name}`" in text for name in pages.STUDIES)
    for name, saved in studies.items():
        assert "/" not in saved.document["command"]  # no machine's paths
        assert all((ROOT / "docs" / "figures" / f"{name}_{file}").exists() for file in saved.document["figures"])


@pytest.mark.parametrize("page", PAGES)
def test_code_fits_a_column_of_a_page(page):
    blocks = (ROOT / page).read_text().split("```python\n")[1:]
    code = [line for block in blocks for line in block.split("```")[0].splitlines() if line.startswith((">>>", "..."))]
    assert not [line for line in code if len(line) > 88]


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")))
def test_pages_of_notebooks_show_them_as_they_are(name):
    page = ROOT / "docs" / "notebooks" / f"{name}.md"
    tool = script(ROOT / "tools" / "make_notebooks.py")
    text = page.read_text()
    assert text.startswith(f"{tool.mark(page.stem)}\n"), f"it is made by: python tools/make_notebooks.py {page.stem}"
    figures = {path.name for path in page.parent.glob(f"{page.stem}_*.png")}
    assert figures and all(f"]({figure})" in text for figure in figures)
    assert "Traceback" not in text and "Warning" not in text


def test_the_site_has_no_prompts_and_links_the_repository_once_it_has_an_address():
    hook = script(ROOT / "tools" / "home_page.py")
    shown = hook.without_prompts("a\n\n```python\n>>> if x:\n...     y\n>>> z\n1\n...\n\n```\n\nb")
    assert shown == "a\n\n```python\nif x:\n    y\nz\n```\n\n```text\n1\n...\n```\n\nb"
    assert hook.with_colab("# A\n\nb", "a", "") == "# A\n\nb"
    place = "https://colab.research.google.com/github/o/r/blob/main/notebooks/a.ipynb"
    assert hook.with_colab("# A\n\nb", "a", "https://github.com/o/r") == f"# A\n\n[Open it in Colab]({place})\n\nb"
    assert "badge" not in hook.home_page("# A\n\nb") and "/badge.svg" in hook.home_page("# A\n\nb", "https://x")


EVIDENCE = ("guides/small_batches.md", "guides/large_batches.md", "which_normalizer.md", "why_it_works.md")
CLAIM = re.compile(r"\b[A-Z]\d?\d?\.\d+(?: \([^)]+\))?")
MEASURED = re.compile(r"-?\d+\.\d+ ± \d+\.\d+")


@pytest.mark.parametrize("page", EVIDENCE)
def test_evidence_is_that_of_the_ledger(page):
    text, pages = (ROOT / "docs" / page).read_text(), script(ROOT / "tools" / "make_results.py")
    known = "".join((ROOT / "docs" / name).read_text() for name in ("ledger.md", "results.md"))
    measured = set(MEASURED.findall(text))
    assert len(measured) > 10 and not {numbers for numbers in measured if numbers not in known}
    studies = {name: saved for name in pages.STUDIES if (saved := pages.published(name))}
    verdicts = {judgment.claim.id: judgment.verdict for judgment in pages.judgments_of(studies)}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    header, found = [], []
    for row in rows:
        if row[0] in ("claim", "normalizer"):
            header = row
        elif header[:1] == ["claim"] and CLAIM.fullmatch(row[0]):
            found.append((row[0], row[-1]))
        elif header[:1] == ["normalizer"]:
            columns = zip(row[1:], ("reproduced", "not reproduced", "undecided"), strict=True)
            found += [(claim, verdict) for cell, verdict in columns for claim in CLAIM.findall(cell)]
    assert len(found) >= 7
    assert {claim: verdicts.get(claim, "") for claim, _ in found} == dict(found)
