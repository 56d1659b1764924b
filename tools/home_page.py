"""A hook of mkdocs: the home page, examples without prompts, and links to the repository once it has an address.

The README is the home page. Examples in doctest form are shown as code that can be copied, with its output below it.

The address stands in pyproject.toml alone, as `[project.urls] Repository = "https://github.com/OWNER/NAME"`. With it
the site links its repository, the home page shows its badge, and pages made of notebooks open in Colab; without it
nothing of this is shown.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def repository() -> str:
    """Returns the repository's address without a trailing slash; empty as long as there is none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project.get("urls", {}).get("Repository", "").rstrip("/")


def on_config(config, **_):
    """Gives the site its repository's address."""
    config["repo_url"] = repository() or None
    return config


def on_page_markdown(markdown: str, page, config, **_) -> str:
    """Returns the README in place of the home page's text, and other pages with their links to the repository."""
    address, source = config["repo_url"] or "", page.file.src_uri
    if source == "index.md":
        markdown = home_page((ROOT / "README.md").read_text(encoding="utf-8"), address)
    elif source.startswith("notebooks/"):
        markdown = with_colab(markdown, Path(source).stem, address)
    return without_prompts(markdown)


def home_page(readme: str, address: str = "") -> str:
    """Changes the README's links into docs/ to lead from docs/, and links to other files to plain text."""
    readme = re.sub(r"\]\(docs/", "](", readme)
    readme = re.sub(r"(?<!!)\[([^\]]+)\]\(([A-Z]\w*\.md)\)", r"\1 (`\2`)", readme)
    if not address:
        return readme
    tests = f"[![tests]({address}/actions/workflows/ci.yml/badge.svg)]({address}/actions)"
    return re.sub(r"^(# .*\n)", rf"\1\n{tests}\n", readme, count=1)


def with_colab(markdown: str, name: str, address: str) -> str:
    """Puts a link that opens a notebook in Colab below its page's title, where Colab can find it."""
    prefix = "https://github.com/"
    if not address.startswith(prefix):
        return markdown
    place = f"https://colab.research.google.com/github/{address.removeprefix(prefix)}/blob/main/notebooks/{name}.ipynb"
    return re.sub(r"(?m)^(# .*\n)", rf"\1\n[Open it in Colab]({place})\n", markdown, count=1)


def without_prompts(markdown: str) -> str:
    """Changes examples in doctest form to blocks of code and blocks of output."""

    def of_block(match: re.Match) -> str:
        parts: list[tuple[str, list[str]]] = []
        for line in match[1].splitlines():
            kind = parts[-1][0] if parts else "text"
            if line.startswith(">>> ") or (kind == "python" and (line == "..." or line.startswith("... "))):
                kind, line = "python", line[4:]
            else:
                kind = "text"
            if not parts or parts[-1][0] != kind:
                parts.append((kind, []))
            parts[-1][1].append(line.replace("  # doctest: +IGNORE_EXCEPTION_DETAIL", ""))
        texts = [(kind, "\n".join(lines).strip("\n")) for kind, lines in parts]
        return "\n\n".join(f"```{kind}\n{text}\n```" for kind, text in texts if text)

    return re.sub(r"(?ms)^```python\n(>>> .*?)^```$", of_block, markdown)
