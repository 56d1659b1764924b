"""Strict settings: 8 CPU devices, rank promotion raises, and public signatures' shapes and types are checked."""

import collections
import functools
import gc
import importlib.metadata
import math
import os
from pathlib import Path

# Where cores are few and busy, simulated devices wait long for each other; and compiling takes most of the tests' time.
# What XLA_FLAGS says already wins. XLA aborts at a flag that its version does not know.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        # A program read from the cache of compiled ones would else let the sums over simulated devices take all the
        # threads that other sums wait for.
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
        "--xla_cpu_collective_call_terminate_timeout_seconds=200 --xla_cpu_collective_timeout_seconds=200"
        if (version := tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))) >= (0, 8)
        else "",
        "--xla_cpu_use_fusion_emitters=false" if version < (0, 11) else "",
        os.environ.get("XLA_FLAGS", ""),
    ]
)

# Programs run where they are called, not beside the caller.
os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "false")

# Programs say where in the source they were made, which takes long to write down.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# What one process has compiled, the others and the next runs read.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest
from hypothesis import settings
from jax._src.interpreters import mlir
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook("bnjax", "typecheck.check")
mlir.make_ir_context = functools.cache(mlir.make_ir_context)  # else made for each program, in 40 % of the tests' time
gc.set_threshold(200_000, 20, 100)  # tracing makes many objects, few of them in cycles

# `pytest tests/test_fuzz.py --hypothesis-profile=fuzz --dist load` generates many thousands of cases.
settings.register_profile("fuzz", max_examples=6000, deadline=None)
settings.register_profile("few", max_examples=50, deadline=None, derandomize=True)
settings.load_profile("few")

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data" / "tfds"


# Files whose tests take long: begun first, lest one process end long after the others.
LONG = ("notebooks", "further_studies", "measured", "studies", "training", "network", "parallel", "resume")


CORE = "core and not exhaustive and not slow"


def pytest_configure(config):
    """Leaves the long tests out of `pytest -m core`."""
    if config.option.markexpr == "core":
        config.option.markexpr = CORE


def pytest_ignore_collect(collection_path, config):
    """Leaves out the files that `pytest -m core` has no tests of, since importing them takes as long as its tests."""
    if config.option.markexpr == CORE and collection_path.match("test_*.py"):
        return "pytest.mark.core" not in collection_path.read_text() or None
    return None


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items):
    for grid in _grids(items):
        for item in _beside_the_diagonal(grid):
            item.add_marker(pytest.mark.exhaustive)
    for item in _further_cases(items):
        item.add_marker(pytest.mark.exhaustive)
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


def _further_cases(items):
    """The cases of tests marked `by_default(n)` after the first n that run by default."""
    counts = collections.Counter()
    for item in items:
        mark = item.get_closest_marker("by_default")
        if mark and not item.get_closest_marker("exhaustive"):
            name = item.nodeid.partition("[")[0]
            counts[name] += 1
            if counts[name] > mark.args[0]:
                yield item


def _grids(items):
    """The cases of each test with several parameters that takes all combinations of their values.

    Of those the default run has as many as the longest list of values, along a diagonal, so that each value occurs.
    """
    cases = collections.defaultdict(list)
    for item in items:
        if hasattr(item, "callspec") and not {"slow", "tpu_compiler"} & {mark.name for mark in item.iter_markers()}:
            cases[item.nodeid.partition("[")[0]].append(item)
    for grid in cases.values():
        if len(values := _values(grid)) > 1 and len(grid) == math.prod(map(len, values.values())):
            yield grid


def _values(grid):
    """The values of each parameter, by identity, in the order of their first use."""
    values = {}
    for item in grid:
        for name, value in item.callspec.params.items():
            values.setdefault(name, {}).setdefault(id(value), len(values[name]))
    return values


def _beside_the_diagonal(grid):
    values = _values(grid)
    longest = max(map(len, values.values()))
    diagonal = {tuple(i % len(values[name]) for name in values) for i in range(longest)}
    for item in grid:
        if tuple(values[name][id(item.callspec.params[name])] for name in values) not in diagonal:
            yield item


@pytest.fixture(autouse=True)
def _without_cache_for_other_devices(request):
    """JAX cannot read from its cache what was compiled for devices that are not there."""
    is_for_others = request.node.get_closest_marker("tpu_compiler") is not None
    if is_for_others:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
    yield
    if is_for_others:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


@pytest.fixture
def x64():
    """float64 for one test."""
    from bnjax._compat import enable_x64  # not before the hook is installed

    with enable_x64():
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Directory of prepared image sets; the test is skipped where there is none."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the prepared data sets are not here (../shared/data/tfds)")
    return SHARED_DATA
