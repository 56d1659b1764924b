"""A hook of mkdocs: the documentation's home page is the README."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, page, **_) -> str:
    """The README in place of the home page's text, with its links as they are from there."""
    return home_page((ROOT / "README.md").read_text()) if page.file.src_uri == "index.md" else markdown


def home_page(readme: str) -> str:
    """Links into docs/ lead from docs/; those to other files are plain text."""
    readme = re.sub(r"\]\(docs/", "](", readme)
    return re.sub(r"(?<!!)\[([^\]]+)\]\(([A-Z]\w*\.md)\)", r"\1 (`\2`)", readme)
