"""A hook of mkdocs that makes the README the documentation's home page."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, page, **_) -> str:
    """Returns the README in place of the home page's text, with its links changed to lead from there."""
    return home_page((ROOT / "README.md").read_text()) if page.file.src_uri == "index.md" else markdown


def home_page(readme: str) -> str:
    """Changes the README's links into docs/ to lead from docs/, and links to other files to plain text."""
    readme = re.sub(r"\]\(docs/", "](", readme)
    return re.sub(r"(?<!!)\[([^\]]+)\]\(([A-Z]\w*\.md)\)", r"\1 (`\2`)", readme)
