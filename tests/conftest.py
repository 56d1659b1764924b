"""Strict settings: 8 CPU devices, rank promotion raises, and public signatures' shapes and types are checked."""

from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook("bnjax", "typecheck.check")

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data" / "tfds"


@pytest.fixture
def x64():
    """float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Directory of prepared image sets; the test is skipped where there is none."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the prepared data sets are not here (../shared/data/tfds)")
    return SHARED_DATA
