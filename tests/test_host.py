"""Memory that is kept for the next arrays: counted in the pages that the system hands out."""

import inspect
import os
import platform
import subprocess
import sys

import pytest

from bnjax.training.host import keep_freed_memory

COUNT_FAULTS = """
import resource
from bnjax.training.host import keep_freed_memory

KEPT and keep_freed_memory()
import jax, jax.numpy as jnp
double = jax.jit(lambda x: x * 2)
x = jnp.ones(2**23 + 2**20)  # 36 MiB, 9216 pages
for _ in range(60):
    double(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    double(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
GLIBC = platform.libc_ver()[0] == "glibc"
needs_glibc = pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")


def page_faults(kept: bool, **variables) -> int:
    code = COUNT_FAULTS.replace("KEPT", str(kept))
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )
    return int(run.stdout)


@needs_glibc
@pytest.mark.exhaustive
def test_freed_memory_is_used_again():
    by_variables = {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "1000000000000",
        "MALLOC_TOP_PAD_": "268435456",
    }
    by_default, kept, otherwise = page_faults(False), page_faults(True), page_faults(False, **by_variables)
    assert by_default >= 20 * 9216 / 16  # at pages of 4 KiB, or some larger ones
    assert max(kept, otherwise) < by_default / 4  # the heap may still grow now and then


def test_what_it_returns_and_refuses():
    code = "from bnjax.training.host import keep_freed_memory; print(keep_freed_memory())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(GLIBC)
    with pytest.raises(ValueError, match="pad must lie in"):
        inspect.unwrap(keep_freed_memory)(-1)


@pytest.mark.parametrize("value", ["1", "0"])
def test_the_command_line_takes_it_from_the_environment(value, monkeypatch, capsys, tmp_path):
    from bnjax.studies.cli import main as cli
    from bnjax.training import host

    asked = []
    monkeypatch.setattr(host, "keep_freed_memory", lambda: asked.append(True))
    monkeypatch.setenv("BNJAX_KEEP_MEMORY", value)
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    assert asked == [True] * (value == "1")
    capsys.readouterr()
