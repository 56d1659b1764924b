"""Every notebook in `notebooks/`: kept without outputs, and run at a small size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import notebook_steps
import pytest
import tiny_sets

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


# A kernel was seen to stand still, once in hundreds of runs: such a one says where, ends, and is begun anew once.
GIVE_UP = "import faulthandler, sys; faulthandler.dump_traceback_later(240, exit=True, file=sys.__stderr__)"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    tiny_sets.prepare("mnist", directory, (600, 100))
    tiny_sets.prepare("cifar10", directory)
    return directory


def test_there_are_seven():
    assert len(NOTEBOOKS) == 7


@by_name
def test_is_kept_clean(path):
    assert path.stat().st_size < 50_000
    cells = json.loads(path.read_text())["cells"]
    kinds = [cell["cell_type"] for cell in cells]
    assert kinds[0] == "markdown" and "".join(cells[0]["source"]).startswith("# ")
    for before, cell in zip([None, *kinds], cells, strict=False):
        if cell["cell_type"] == "code":
            assert before == "markdown", "every cell has a sentence before it"
            assert cell["outputs"] == [] and cell["execution_count"] is None
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert code[0] == '%pip install -q "bnjax[studies]"'
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert text.count("<details markdown><summary>Answer</summary>") == text.count("</details>") == 3
    assert "## The answer" in text and "](../docs/" in text


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, id=p.stem, marks=pytest.mark.exhaustive if p.stem != "inside_batch_norm" else ())
        for p in NOTEBOOKS
    ],
)
def test_runs_at_a_small_size_and_shows_figures(path, data_dir, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    # All is installed, so that the install cell finds nothing to do, and asks no index.
    settings = {"TFDS_DATA_DIR": str(data_dir), "JAX_PLATFORMS": "cpu", "PIP_NO_INDEX": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    for last in (False, True):
        notebook = notebook_steps.small(nbformat.read(path, as_version=4))
        notebook.cells.insert(0, nbformat.v4.new_code_cell(GIVE_UP))
        place = {"metadata": {"path": str(path.parent)}}
        try:
            nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
            break
        except nbclient.exceptions.DeadKernelError:
            if last:
                raise
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    shown = [output for output in outputs if "image/png" in output.get("data", {})]
    assert shown and all(len(output.data["image/png"]) > 1000 for output in shown)


@pytest.mark.tpu_compiler
@by_name
def test_every_step_compiles_for_one_chip_and_for_eight(path, data_dir):
    pytest.importorskip("libtpu")
    script = Path(__file__).parent / "notebook_steps.py"
    environment = {**os.environ, "TFDS_DATA_DIR": str(data_dir)}
    ran = subprocess.run([sys.executable, script, path.stem], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout.count(" programs compiled") == 2
    assert ("0 mapped by pmap" in ran.stdout) == (path.stem != "many_devices")
