"""The directions of imports, and that `import bnjax` stays light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bnjax

PACKAGE = Path(bnjax.__file__).parent
# Each module may import those before it.
ORDER = [
    "_compat",
    "_extras",
    "_checks",
    "_dtypes",
    "_collectives",
    "_hlo",
    "_remat",
    "host",
    "compile",
    "_moments",
    "norm",
    "variants",
    "linen",
    "nnx",
    "analysis",
    "losses",
    "layers",
    "inference",
    "describe",
    "augment",
    "models",
    "convert",
    "data",
    "checkpoint",
    "parallel",
    "state",
    "step",
    "train",
    "studies",
    "__main__",
]
STUDIES = [
    "__init__",
    "saving",
    "experiment",
    "network",
    "measured",
    "statistics",
    "claims",
    "results",
    "logs",
    "plots",
]
STUDIES += [
    "landscape",
    "deep_linear",
    "perceptrons",
    "vgg",
    "circles",
    "blobs",
    "mnist",
    "sensitivity",
    "recurrent",
    "cifar",
]
STUDIES += ["accelerating", "activations", "smoothness", "steps", "ledger", "report", "notebook", "console"]


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
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} | packages
    assert modules == set(ORDER)
    for name in modules - packages:
        used = {part.split(".")[1] for part in imports(PACKAGE / f"{name}.py") if part.startswith("bnjax.")} & modules
        assert used <= set(ORDER[: ORDER.index(name)]), name


def test_studies_import_one_way():
    assert {path.stem for path in (PACKAGE / "studies").glob("*.py")} == set(STUDIES)
    for name in STUDIES:
        all_imports = imports(PACKAGE / "studies" / f"{name}.py")
        used = {part.split(".")[2] for part in all_imports if part.startswith("bnjax.studies.")} & set(STUDIES)
        assert used <= set(STUDIES[: STUDIES.index(name)]), name
        assert "bnjax.__main__" not in all_imports


def test_analysis_knows_neither_flax_nor_training():
    for path in (PACKAGE / "analysis").glob("*.py"):
        used = {name for name in imports(path) if name.startswith("bnjax") and not name.startswith("bnjax.analysis")}
        assert used <= {"bnjax", "bnjax._extras", "bnjax._extras.needs"}, (
            path
        )  # `from bnjax import analysis` in none but examples
        assert not any(name.split(".")[0] in ("flax", "optax") for name in imports(path)), path


def test_one_module_knows_versions():
    asks = re.compile(r"(jax|flax)\.__version|hasattr\((jax|lax|nnx)")
    for path in PACKAGE.rglob("*.py"):
        assert bool(asks.search(path.read_text())) == (path.name == "_compat.py"), path


def test_importing_analysis_is_light():
    code = "import bnjax.analysis, sys; print([n for n in ('flax', 'optax', 'matplotlib') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


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


def test_help_and_lists_do_without_jax():
    for arguments in (["--help"], ["run", "circles", "--help"], ["list"], ["--version"]):
        code = f"""
import sys
from bnjax.__main__ import main
try:
    main({arguments})
except SystemExit:
    pass
print([name for name in ("jax", "numpy", "flax") if name in sys.modules])
"""
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert out.splitlines()[-1] == "[]", arguments


def test_public_names_are_there_whatever_was_imported_first():
    for module in ("bnjax", "bnjax.norm", "bnjax._moments", "bnjax.linen"):
        code = f"import {module}, bnjax; print(all(getattr(bnjax, name).__name__ == name for name in bnjax.__all__))"
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert out.strip() == "True", module
    assert set(bnjax.__all__) <= set(dir(bnjax))
    with pytest.raises(AttributeError, match=r"'bnjax' has no attribute 'batchnorm'$"):
        bnjax.batchnorm  # noqa: B018


def test_modules_are_attributes_and_names_that_are_elsewhere_are_told():
    code = """
import bnjax
print(bnjax.linen.BatchNorm.__name__, bnjax.nnx.BatchNorm.__module__, bnjax.analysis.__name__, bnjax.studies.__name__)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["BatchNorm", "bnjax.nnx", "bnjax.analysis", "bnjax.studies"]
    assert {"linen", "nnx", "variants", "train"} <= set(dir(bnjax))
    where = r"no attribute 'BatchNorm'; it is in bnjax.linen and bnjax.nnx: from bnjax.linen import BatchNorm$"
    with pytest.raises(AttributeError, match=where):
        bnjax.BatchNorm  # noqa: B018
    layers, functions = bnjax._ELSEWHERE.values()
    for module in (bnjax.linen, bnjax.nnx):
        classes = {name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
        assert set(layers) == {name for name in classes if not name.startswith("_")}
    assert set(functions) == {name for name in bnjax.variants.__all__ if not name.startswith("init_")}


def test_public_names_are_documented():
    for name in bnjax.__all__:
        doc = getattr(bnjax, name).__doc__
        assert doc
        if name[0].islower():
            assert all(part in doc for part in ("Args:", "Returns:", "Raises:", "References:", ">>>")), name
