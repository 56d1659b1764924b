"""The directions of imports, and that `import bnjax` stays light."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bnjax

PACKAGE = Path(bnjax.__file__).parent
# The floors of the house, from the ground up. Each module may import those before it, and no others.
FLOORS = """
    _compat _extras _objective _checks _dtypes _remat
    _counts _sync _sums _sampled _exact _moments _product _affine
    norm
    <root>
    variants: frozen ghost lp moving noisy renorm split .
    _functional _fold _layers _linen_pairs _nnx_pairs
    linen nnx
    _calls
    analysis: _draw _trees selection _iterate _conjugate _lanczos operators _batches curvature eigen _sketch traces
    analysis: diagonals spectrum
    analysis: vocabulary probe activations shift sharding gradients noise loop surface . curvature_plots plots
    analysis: losses
    models: layers networks .
    convert: state arrays _framework nnx torch keras haiku equinox .
    inference: folding fold_model reestimate description .
    training: _hlo _roll_call host mesh parameters state step loop . checkpoint ahead_of_time
    studies: . data.sets data data.augmentation
    studies: evidence.statistics evidence.conditions evidence.claims evidence.record evidence.results evidence
    studies: engine.saving engine.histograms engine.plan engine.inference engine.memory engine.mappings engine.training
    studies: engine.steps
    studies: engine
    studies: evidence.plots evidence.ledger landscape perceptrons vgg
    studies: circles blobs mnist sensitivity recurrent cifar accelerating activations smoothness deep_linear papers
    studies: cli.arguments cli.output cli.processes cli.folder cli.logs cli.report cli.notebook cli.console cli.main cli
    __main__
"""
# What wings that stand by themselves may use, whatever the order.
APART = {
    "analysis": {"_extras", "analysis"},
    "models": {"_sync", "_linen_pairs", "models"},
    "convert": {"_extras", "convert"},
}


def ordered() -> list[str]:
    """The dotted names of `FLOORS`; a dot stands for the package itself."""
    names = []
    for floor in FLOORS.split("\n"):
        package, _, inside = floor.rpartition(":")
        for name in inside.split():
            names.append(f"{package.strip()}.{name}".strip(".") if package else name)
    return names


@functools.cache
def modules() -> dict[str, Path]:
    """All modules of the package by their dotted names within it."""
    paths = {path: path.relative_to(PACKAGE).with_suffix("").parts for path in PACKAGE.rglob("*.py")}
    return {".".join(p for p in parts if p != "__init__") or "<root>": path for path, parts in paths.items()}


def imports(path: Path) -> set[str]:
    """All modules that a file imports, at any level, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@functools.cache
def imports_within(path: Path) -> set[str]:
    """The modules of the package that a file imports, by their dotted names within it."""
    used = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                used.add(full if full.removeprefix("bnjax.") in modules() else str(node.module))
    return {name.removeprefix("bnjax").removeprefix(".") or "<root>" for name in used if name.split(".")[0] == "bnjax"}


def test_imports_go_one_way():
    order, paths = ordered(), modules()
    assert sorted(order) == sorted(paths)
    for name, path in paths.items():
        before = {"<root>"} if name == "<root>" else set()
        above = imports_within(path) - set(order[: order.index(name)]) - before
        assert not above, f"{name} imports {sorted(above)}, which stand above it"


def test_wings_stand_apart():
    for name, path in modules().items():
        wing = name.split(".")[0] if name != "analysis.losses" else ""  # which knows the layers that it measures
        others = {used.split(".")[0] for used in imports_within(path)} - APART.get(wing, set())
        assert wing not in APART or not others, f"{name} imports {sorted(others)}"


def test_no_kind_of_norm_is_asked_by_isinstance_outside_the_layers():
    for name, path in modules().items():
        if name in ("linen", "nnx"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
                kinds = ast.unparse(node.args[1])
                asks = re.search(r"[A-Za-z]Norm\b|BatchRenorm|_Normalizer", kinds)
                assert not asks, f"{name}, line {node.lineno}: {kinds}"


def test_analysis_knows_neither_flax_nor_training():
    for path in (PACKAGE / "analysis").glob("*.py"):
        if path.stem != "losses":  # which makes losses of Flax models, and which none of the others imports
            assert imports_within(path) <= {"_extras"} | {name for name in modules() if name.startswith("analysis")}, (
                path
            )
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
from bnjax.studies.cli.main import main
try:
    main({arguments})
except SystemExit:
    pass
print([name for name in ("jax", "flax", "optax", "orbax", "sklearn", "rich") if name in sys.modules])
"""
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert out.splitlines()[-1] == "[]", arguments


@pytest.mark.exhaustive
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
    assert {"linen", "nnx", "variants", "training"} <= set(dir(bnjax))
    where = r"no attribute 'BatchNorm'; it is in bnjax.linen and bnjax.nnx: from bnjax.linen import BatchNorm$"
    with pytest.raises(AttributeError, match=where):
        bnjax.BatchNorm  # noqa: B018
    layers, functions = bnjax._ELSEWHERE.values()
    for module in (bnjax.linen, bnjax.nnx):
        classes = {name for name, value in vars(module).items() if isinstance(value, type) and not name.startswith("_")}
        assert set(layers) == {name for name in classes if getattr(module, name).__module__ == module.__name__}
    assert set(functions) == {name for name in bnjax.variants.__all__ if not name.startswith("init_")}


def test_public_names_are_documented():
    for name in bnjax.__all__:
        doc = getattr(bnjax, name).__doc__
        assert doc
        if name[0].islower():
            assert all(part in doc for part in ("Args:", "Returns:", "Raises:", "References:", ">>>")), name
