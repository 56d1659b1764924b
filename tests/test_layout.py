"""The directions of imports, and that `import bnjax` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import bnjax

PACKAGE = Path(bnjax.__file__).parent
# Each module may import those before it.
ORDER = [
    "_checks",
    "_collectives",
    "_hlo",
    "compile",
    "moments",
    "norm",
    "linen",
    "nnx",
    "layers",
    "augment",
    "models",
    "data",
    "checkpoint",
    "parallel",
    "state",
    "step",
    "train",
    "studies",
    "__main__",
]
STUDIES = ["__init__", "saving", "experiment", "network", "results", "plots"]
STUDIES += ["circles", "blobs", "mnist", "cifar", "steps", "console"]


def imports(path: Path) -> set[str]:
    """All modules that a file imports, at any level, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_go_one_way():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} | {"studies"}
    assert modules == set(ORDER)
    for name in modules - {"studies"}:
        used = {part.split(".")[1] for part in imports(PACKAGE / f"{name}.py") if part.startswith("bnjax.")} & modules
        assert used <= set(ORDER[: ORDER.index(name)]), name


def test_studies_import_one_way():
    assert {path.stem for path in (PACKAGE / "studies").glob("*.py")} == set(STUDIES)
    for name in STUDIES:
        all_imports = imports(PACKAGE / "studies" / f"{name}.py")
        used = {part.split(".")[2] for part in all_imports if part.startswith("bnjax.studies.")} & set(STUDIES)
        assert used <= set(STUDIES[: STUDIES.index(name)]), name
        assert "bnjax.__main__" not in all_imports


def test_modules_are_readable_in_one_sitting():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path


def test_importing_bnjax_is_light():
    heavy = ("flax", "optax", "tensorflow_datasets", "sklearn", "matplotlib", "scipy.stats", "rich", "chex", "orbax")
    code = f"""
import jax, sys
before = set(sys.modules)
import bnjax
print([name for name in {heavy} if name in set(sys.modules) - before])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_public_names_are_documented():
    for name in bnjax.__all__:
        doc = getattr(bnjax, name).__doc__
        assert doc
        if name[0].islower():
            assert all(part in doc for part in ("Args:", "Returns:", "Raises:", "References:", ">>>")), name
