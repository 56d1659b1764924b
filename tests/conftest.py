"""Strict settings: 8 CPU devices, rank promotion raises, and public signatures' shapes and types are checked."""

import collections
import functools
import gc
import importlib.metadata
import math
import os
import zlib
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


def pytest_xdist_auto_num_workers(config):
    """One process more than there are cores, since tests wait for processes and for simulated devices."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else None


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
    for grid, entries in _grids(items):
        for item in _beside_the_diagonal(grid, entries):
            item.add_marker(pytest.mark.exhaustive)
    for item in _further_cases(items):
        item.add_marker(pytest.mark.exhaustive)
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


def _further_cases(items):
    """The cases of tests marked `by_default(n)` but for n of those that ran by default without the mark.

    Which n differs from test to test, so that tests of one list, of mappings for instance, run all its entries.
    """
    cases = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("by_default") and not item.get_closest_marker("exhaustive"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for name, of_test in cases.items():
        first = zlib.crc32(name.encode()) % len(of_test)
        yield from [*of_test[first:], *of_test[:first]][of_test[0].get_closest_marker("by_default").args[0] :]


def _grids(items):
    """The cases of each test that takes all combinations of several lists' entries, and the entries of each list.

    Of those the default run has as many as the longest list of entries, along a diagonal, so that each entry occurs.
    """
    cases = collections.defaultdict(list)
    for item in items:
        if hasattr(item, "callspec") and not {"slow", "tpu_compiler"} & {mark.name for mark in item.iter_markers()}:
            cases[item.nodeid.partition("[")[0]].append(item)
    for grid in cases.values():
        if len(entries := _entries(grid)) > 1 and len(grid) == math.prod(map(len, entries)):
            yield grid, entries


def _entries(grid):
    """The entries of each list of parameters, by the identity of their values, in the order of their first use."""
    entries = collections.defaultdict(dict)
    for item in grid:
        for names, entry in _entries_of(item).items():
            entries[names].setdefault(entry, len(entries[names]))
    return list(entries.values())


def _entries_of(item):
    """A case's entry in each list of parameters, by the names of its parameters."""
    marked = [mark.args[0] for mark in item.iter_markers("parametrize")]
    lists = [tuple(names.replace(",", " ").split()) if isinstance(names, str) else tuple(names) for names in marked]
    values = item.callspec.params
    lists += [(name,) for name in values if not any(name in names for names in lists)]  # of fixtures
    return {names: tuple(id(values[name]) for name in names) for names in lists}


def _beside_the_diagonal(grid, entries):
    longest = max(map(len, entries))
    diagonal = {tuple(i % len(of_list) for of_list in entries) for i in range(longest)}
    for item in grid:
        places = zip(entries, _entries_of(item).values(), strict=True)
        if tuple(of_list[entry] for of_list, entry in places) not in diagonal:
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
