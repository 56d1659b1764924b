"""The documentation in a browser: on a phone and on a desk, in light and in dark; `pytest -m browser`.

It needs `pip install -e '.[test,docs]' playwright` and a Chromium: the system's, or `playwright install chromium`. With
BNJAX_SCREENSHOTS set to a directory, each page is saved there as a picture for each width and scheme.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WIDTHS = (390, 1280)
SCHEMES = ("light", "dark")
LEAST_CONTRAST = 4.5  # of text, Web Content Accessibility Guidelines 2.2, success criterion 1.4.3

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    directory = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "-d", directory], cwd=ROOT, check=True)
    return directory


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    with playwright.sync_playwright() as started:
        try:
            browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


# What is wider than the page, but for what lies in a box that scrolls; and what is not shown.
WIDER = """() => {
  const width = document.documentElement.clientWidth;
  const scrolls = e => e && (["auto", "scroll"].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  const wide = [...document.querySelectorAll("article *")]
    .filter(e => e.getBoundingClientRect().right > width + 1 && e.offsetParent && !scrolls(e));
  return wide.slice(0, 3).map(e => e.outerHTML.slice(0, 120));
}"""
MISSING = "() => [...document.images].filter(i => i.complete && i.naturalWidth === 0).map(i => i.src)"
# The least contrast of text with what lies behind it.
CONTRAST = """() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const light = c => {
    const [r, g, b] = c.slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = e => {
    const layers = [];
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      layers.push([c[0], c[1], c[2], c.length > 3 ? c[3] : 1]);
    }
    return layers.reduceRight((under, c) => under.map((v, i) => v * (1 - c[3]) + c[i] * c[3]), [255, 255, 255]);
  };
  let worst = [Infinity, ""];
  for (const e of document.querySelectorAll("article p, article td, article th, article li, article h1, article h2")) {
    if (!e.offsetParent || !e.textContent.trim()) continue;
    const back = behind(e), style = parse(getComputedStyle(e).color), alpha = style.length > 3 ? style[3] : 1;
    const front = back.map((v, i) => v * (1 - alpha) + style[i] * alpha);
    const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
    const found = (a + 0.05) / (b + 0.05);
    if (found < worst[0]) worst = [found, e.outerHTML.slice(0, 120)];
  }
  return worst;
}"""


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_page_fits_and_can_be_read(site, chromium, width, scheme):
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    shots = os.environ.get("BNJAX_SCREENSHOTS")
    paths = [path for path in sorted(site.rglob("*.html")) if path.name != "404.html"]
    assert len(paths) > 30
    for path in paths:
        name = str(path.relative_to(site))
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert page.evaluate(WIDER) == [], name
        assert page.evaluate(MISSING) == [], name
        contrast, text = page.evaluate(CONTRAST)
        assert contrast >= LEAST_CONTRAST, (name, text)
        if shots:
            page.screenshot(path=Path(shots) / f"{name.replace('/', '_')}-{width}-{scheme}.png", full_page=True)
    assert errors == []
    page.close()


def test_wide_tables_scroll_on_a_phone(site, chromium):
    page = chromium.new_page(viewport={"width": 390, "height": 900})
    page.goto((site / "ledger.html").as_uri())
    moved = page.evaluate("""() => {
      const wide = e => e.querySelector("table") && e.scrollWidth > e.clientWidth + 50;
      const box = [...document.querySelectorAll(".md-typeset__scrollwrap")].find(wide);
      box.scrollLeft = 50;
      return box.scrollLeft;
    }""")
    assert moved == 50
    page.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_search_finds_a_page_in_a_directory(site, chromium, width):
    page = chromium.new_page(viewport={"width": width, "height": 900})
    page.goto((site / "index.html").as_uri())
    if width < 1000:
        page.click(".md-header__button[for=__search]")
    page.type("input[name=query]", "batch renorm")
    link = page.wait_for_selector(".md-search-result__item a", timeout=20_000)
    assert link.get_attribute("href").startswith("file://")
    page.close()


def test_code_is_copied_without_prompts(site, chromium):
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.goto((site / "index.html").as_uri())
    code = page.evaluate("[...document.querySelectorAll('article pre code')].map(e => e.textContent)")
    assert len(code) > 5 and not [text for text in code if text.lstrip().startswith(">>>")]
    assert page.query_selector("article .md-clipboard, article .md-code__button") is not None
    page.close()
