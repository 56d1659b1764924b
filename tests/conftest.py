"""Strict settings: 8 CPU devices, rank promotion raises, and public signatures' shapes and types are checked."""

import importlib.metadata
import os
from pathlib import Path

# Where cores are few and busy, simulated devices wait long for each other; and compiling takes most of the tests' time.
# What XLA_FLAGS says already wins. XLA aborts at a flag that its version does not know.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_collective_call_terminate_timeout_seconds=200 --xla_cpu_collective_timeout_seconds=200"
        if (version := tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))) >= (0, 8)
        else "",
        "--xla_cpu_use_fusion_emitters=false" if version < (0, 11) else "",
        os.environ.get("XLA_FLAGS", ""),
    ]
)

# Programs run where they are called, not beside the caller.
os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "false")

import jax
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook("bnjax", "typecheck.check")

# `pytest tests/test_fuzz.py --hypothesis-profile=fuzz --dist load` generates many thousands of cases.
settings.register_profile("fuzz", max_examples=6000, deadline=None)
settings.register_profile("few", max_examples=50, deadline=None, derandomize=True)
settings.load_profile("few")

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data" / "tfds"


# Files whose tests take long: begun first, lest one process end long after the others.
LONG = ("notebooks", "further_studies", "measured", "studies", "train", "network", "parallel", "resume", "compile")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


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
