"""The page made of results: complete, self-contained, accessible, and no wider than a screen."""

import datetime
import html.parser
import itertools
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from bnjax.studies import circles
from bnjax.studies.cli.main import main
from bnjax.studies.cli.report import write_report
from bnjax.studies.evidence.claims import lessons
from bnjax.studies.evidence.results import Results, save

CHROMIUM = shutil.which("chromium")
VOID = {"meta", "img", "br", "link", "input"}


def make_run(directory):
    """Results of a study as `bnjax run` leaves them."""
    results = Results("circles", {"epochs": 100, "rates": [0.1, 0.2], "dataset": "<made up>"}, range(3))
    for i, name in enumerate(("none", "after", "before")):
        accuracy = np.array([0.84, 0.85, 0.83]) - 0.01 * (name == "before")
        metrics = {f"further_metric_{j}": np.arange(3.0) for j in range(10)}  # for a table wider than the page
        metrics |= {"test_accuracy": accuracy, "epochs_to_80_percent": np.array([10.0, 11.0, 10.0 + i])}
        results.variants[name] = (f"variant {name} & co", {}, metrics)
    results.parameters["after"] = {"params": {"Dense_0/kernel": (2, 50)}, "batch_stats": {"BatchNorm_0/mean": (50,)}}
    results.judge(circles.CLAIMS)
    results.options = {"seeds": 3}
    figure = Figure(figsize=(3, 2))
    figure.suptitle("Accuracy <of all>")
    axes = figure.subplots()
    axes.plot([1, 2], label="after")
    axes.set(xlabel="epoch", ylabel="accuracy")
    axes.legend()
    directory.mkdir(parents=True)
    save(results, {"learning_curves.png": figure}, directory, 12.0, datetime.datetime.now(datetime.UTC))
    return results


def test_runs_of_one_study_have_sections_of_their_own(tmp_path):
    for name in ("circles", "circles_again"):
        make_run(tmp_path / name)
    assert write_report(tmp_path, tmp_path / "page.html") == (2, [])
    page = Page((tmp_path / "page.html").read_text())
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert {"circles", "circles_again"} <= set(identifiers) and len(set(identifiers)) == len(identifiers)
    assert identifiers.count("claim-S1.1") == 1  # every claim once


class Page(html.parser.HTMLParser):
    """Collects the elements of a page and checks that they are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    directory = tmp_path_factory.mktemp("report") / "runs"
    results = make_run(directory / "circles")
    out = directory / "report.html"
    assert write_report(directory, out) == (1, [])
    return results, out, Page(out.read_text())


def test_page_shows_every_claim_table_figure_and_setting(report):
    results, _, page = report
    text = " ".join(" ".join(page.text).split())
    for judgment in results.claims:
        assert judgment.claim.statement in text and judgment.claim.rule in text
        assert judgment.measured in text and judgment.verdict in text
        assert f"Control: {judgment.claim.control}" in text and f"Margin: {judgment.claim.margin}" in text
    assert "variant before & co" in text and "84.00 ± 2.48" in text  # accuracy in per cent, by Student's t
    assert "Accuracy <of all>" in text and "<made up>" in text and "0.1, 0.2" in text and "seeds 3" in text
    assert "variant trainable batch statistics variant after & co 100 50" in text
    assert [image["alt"] for image in page.all("img")] == ["Accuracy <of all>. accuracy against epoch. after"]
    assert "bnjax run circles --seeds 3" in text


def test_page_opens_with_what_was_learned(report):
    results, _, page = report
    (sentence,) = lessons(circles.__file__, results.claims)  # these verdicts are no published ones
    text = " ".join(" ".join(page.text).split())
    assert sentence.startswith(f"Of {len(results.claims)} claims, ") and text.index(sentence) < text.index("S1.12 ")


def test_claims_lead_to_their_figures_and_back(report):
    results, _, page = report
    links = [attributes["href"] for attributes in page.all("a")]
    identifiers = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    shown = [j.claim.id for j in results.claims if "learning_curves.png" in j.claim.figures]
    assert links.count("#circles-learning_curves.png") == len(shown) > 3
    assert {f"#claim-{name.replace(' ', '-')}" for name in shown} <= set(links)
    assert all(f"claim-{j.claim.id.replace(' ', '-')}" in identifiers for j in results.claims)


def test_claims_can_be_filtered_by_verdict_without_a_script(report):
    results, out, page = report
    chosen = [attributes["id"] for attributes in page.all("input") if "id" in attributes]
    verdicts = dict.fromkeys(judgment.verdict for judgment in results.claims)
    assert sorted(chosen) == sorted(f"verdict-{verdict.replace(' ', '-')}" for verdict in verdicts)
    rows = [attributes["data-verdict"] for attributes in page.all("tr") if "data-verdict" in attributes]
    assert rows == [judgment.verdict for judgment in results.claims]
    for verdict in verdicts:
        slug = verdict.replace(" ", "-")
        rule = f'#claims-all:has(#verdict-{slug}:checked) tr[data-verdict]:not([data-verdict="{verdict}"])'
        assert rule in out.read_text()


def test_page_of_published_results(tmp_path):
    make_run(tmp_path / "runs" / "circles")
    published, figures = tmp_path / "docs" / "results", tmp_path / "docs" / "figures"
    published.mkdir(parents=True), figures.mkdir()
    shutil.copy(tmp_path / "runs" / "circles" / "results.json", published / "circles.json")
    shutil.copy(tmp_path / "runs" / "circles" / "learning_curves.png", figures / "circles_learning_curves.png")
    (published / "another.json").write_text("{}")  # of something else
    assert write_report(published, tmp_path / "page.html") == (1, [])
    page = Page((tmp_path / "page.html").read_text())
    assert len(page.all("img")) == 1


def test_page_needs_nothing_else(report):
    _, out, page = report
    assert [image["src"][:22] for image in page.all("img")] == ["data:image/png;base64,"]
    assert not page.all("script") and not page.all("link") and "@import" not in out.read_text()
    links = [attributes["href"] for attributes in page.all("a")]
    identifiers = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert links and all(link.startswith("#") and link[1:] in identifiers for link in links)


def test_page_is_accessible(report):
    _, _, page = report
    assert page.all("html") == [{"lang": "en"}]
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    assert all(image["alt"] for image in page.all("img"))
    headings = [int(tag[1]) for tag, _ in page.elements if tag[0] == "h" and tag[1:].isdigit()]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(headings))
    assert all(th.get("scope") in ("col", "row") for th in page.all("th"))
    scrolled = [div for div in page.all("div") if div.get("class") == "scroll"]
    assert scrolled and all(div["tabindex"] == "0" and div["aria-label"] for div in scrolled)
    named = [attributes["aria-labelledby"] for attributes in page.all("section")]
    assert named and set(named) <= {attributes.get("id") for _, attributes in page.elements}


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_page_is_no_wider_than_the_screen(report, width, tmp_path):
    _, out, _ = report
    frame = tmp_path / "frame.html"
    page = json.dumps(out.read_text().replace('loading="lazy"', "")).replace("</", "<\\/")
    frame.write_text(
        f"<body><p id='found'></p><script>const page = {page}; const frame = document.createElement('iframe');"
        f"frame.style = 'border: 0; width: {width}px; height: 900px'; frame.onload = () => {{"
        "const shown = frame.contentDocument; const root = shown.documentElement;"
        "document.querySelector('#found').textContent = "
        "`over ${root.scrollWidth - root.clientWidth} images ${[...shown.images].filter(i => i.naturalWidth).length}`;"
        "}; frame.srcdoc = page; document.body.append(frame);</script>"
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--virtual-time-budget=5000", "--dump-dom", frame.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    assert '<p id="found">over 0 images 1</p>' in dom


def test_command(tmp_path, capsys):
    make_run(tmp_path / "circles")
    assert main(["report", str(tmp_path / "circles"), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'page.html'}: 1 study, ")
    assert "Batch norm: circles" in Path(tmp_path / "page.html").read_text()
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "is no directory" in capsys.readouterr().err
