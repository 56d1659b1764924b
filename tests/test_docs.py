"""The examples of README and docstrings run as printed."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax

ROOT = Path(__file__).parents[1]
MODULES = [m.name for m in pkgutil.walk_packages(bnjax.__path__, "bnjax.") if not m.name.endswith("__main__")]
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize("name", ["bnjax", *MODULES])
def test_docstrings(name):
    module = importlib.import_module(name)
    given = {"jax": jax, "jnp": jnp, "np": np}
    assert doctest.testmod(module, extraglobs=given, optionflags=FLAGS).failed == 0


def test_enough_docstrings_have_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = [t for name in MODULES for t in finder.find(importlib.import_module(name)) if t.examples]
    assert len(tests) >= 10


def test_readme():
    source = (ROOT / "README.md").read_text()
    code = "\n".join(block.split("```")[0] for block in source.split("```python\n")[1:])
    assert code.count(">>>") >= 5
    test = doctest.DocTestParser().get_doctest(code, {}, "README.md", "README.md", 0)
    assert doctest.DocTestRunner(optionflags=FLAGS).run(test).failed == 0
