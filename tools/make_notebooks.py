"""Runs the notebooks at full size, and writes what they show as pages of the documentation.

    python tools/make_notebooks.py [NAME …]

Each page `docs/notebooks/NAME.md`, with its figures beside it, says of which notebook it was made; a test holds that
the two belong together. It needs `pip install -e '.[notebooks,test]'`, and the data sets that the notebooks load.
"""

import argparse
import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NOTEBOOKS, PAGES = ROOT / "notebooks", ROOT / "docs" / "notebooks"
MOST_SECONDS = 180  # on two cores, such as Colab's


def mark(name: str) -> str:
    """Returns the line that a page made of a notebook as it is begins with."""
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    text = json.dumps([[cell["cell_type"], "".join(cell["source"])] for cell in cells])
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"<!-- made of notebooks/{name}.ipynb ({digest}) by: python tools/make_notebooks.py {name} -->"


def executed(name: str) -> tuple[Any, float]:
    """Runs a notebook; returns it with its outputs, and the seconds that it took."""
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    install = next(cell for cell in notebook.cells if cell.cell_type == "code")
    source, install.source = install.source, "pass"  # what it installs is there
    started = time.monotonic()
    client = nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(NOTEBOOKS)}})
    client.execute()
    install.source = source
    return notebook, time.monotonic() - started


def page(name: str, notebook: Any) -> tuple[str, dict[str, bytes]]:
    """Returns the text of a notebook's page, and its figures by name."""
    from nbconvert import MarkdownExporter

    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _joined([shown for shown in cell.outputs if _is_shown(shown)])
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    figures = {f"{name}_{number}.png": content for number, content in enumerate(resources["outputs"].values())}
    for old, new in zip(resources["outputs"], figures, strict=True):
        text = text.replace(f"![png]({old})", f"![What the code above draws]({new})")
    text = re.sub(r"\]\(\.\./docs/", "](../", text)  # the page lies within docs/
    text = re.sub(r"(?m)[ \t]+$", "", text)
    return f"{mark(name)}\n\n{text.strip()}\n", figures


def _is_shown(output: Any) -> bool:
    """Says whether an output is one that a reader looks for, and no figure's text or warning."""
    data = output.get("data", {})
    if "image/png" in data:
        data.pop("text/plain", None)
    return output.output_type != "stream" or output.name == "stdout"


def _joined(outputs: list[Any]) -> list[Any]:
    """Puts together what was printed without anything else between."""
    joined: list[Any] = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream":
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def main() -> None:
    """Makes the pages of all notebooks, or of those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="notebooks such as circles (default all)")
    PAGES.mkdir(exist_ok=True)
    for name in parser.parse_args().names or sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")):
        notebook, seconds = executed(name)
        text, figures = page(name, notebook)
        for old in PAGES.glob(f"{name}_*.png"):
            old.unlink()
        for file, content in figures.items():
            (PAGES / file).write_bytes(content)
        (PAGES / f"{name}.md").write_text(text, encoding="utf-8")
        print(f"{name}: {seconds:.0f} s, {len(figures)} figures", flush=True)
        if seconds > MOST_SECONDS:
            print(f"  more than {MOST_SECONDS} s: a reader waits too long", flush=True)


if __name__ == "__main__":
    main()
