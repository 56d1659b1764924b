"""What works without any extra, and what is said where one is missing: imports are blocked in a process of its own."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What the extras install, by the names under which it is imported.
BLOCKED = ["matplotlib", "mpl_toolkits", "sklearn", "PIL", "tensorflow_datasets", "array_record", "importlib_resources"]
BLOCKED += [
    "plotly",
    "jinja2",
    "IPython",
    "safetensors",
    "tensorboardX",
    "wandb",
    "chex",
    "torch",
    "keras",
    "haiku",
    "equinox",
]
NEEDS_EXTRAS = {  # modules that can't be imported without, and the extra that their message names
    "bnjax.analysis._draw": "plots",
    "bnjax.analysis.curvature_plots": "plots",
    "bnjax.analysis.plots": "plots",
    "bnjax.studies.accelerating": "studies",
    "bnjax.studies.activations": "studies",
    "bnjax.studies.blobs": "studies",
    "bnjax.studies.cifar": "studies",
    "bnjax.studies.deep_linear": "studies",
    "bnjax.studies.papers": "studies",
    "bnjax.studies.circles": "studies",
    "bnjax.studies.landscape": "studies",
    "bnjax.studies.mnist": "studies",
    "bnjax.studies.cli.console": "studies",
    "bnjax.studies.cli.notebook": "notebooks",
    "bnjax.studies.evidence.plots": "studies",
    "bnjax.studies.recurrent": "studies",
    "bnjax.studies.cli.report": "studies",
    "bnjax.studies.sensitivity": "studies",
    "bnjax.studies.smoothness": "studies",
}
BLOCK = f"""
import sys
for name in {BLOCKED}:
    sys.modules[name] = None
"""


def run_without_extras(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-W", "error", "-c", BLOCK + code], capture_output=True, text=True)


def test_every_module_imports_or_names_its_extra():
    done = run_without_extras("""
import importlib, json, pkgutil
import bnjax
from bnjax._extras import MissingExtraError
messages = {}
for module in pkgutil.walk_packages(bnjax.__path__, "bnjax."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except MissingExtraError as error:
            messages[module.name] = str(error)
print(json.dumps(messages))
""")
    assert done.returncode == 0, done.stderr
    messages = json.loads(done.stdout)
    assert set(messages) == set(NEEDS_EXTRAS)
    for name, extra in NEEDS_EXTRAS.items():
        assert re.fullmatch(rf"\w+ is not installed: pip install 'bnjax\[{extra}\]'", messages[name]), name


def test_the_base_computes_without_extras():
    done = run_without_extras("""
import functools
import jax, jax.numpy as jnp, optax
import flax.linen as nn
from flax import nnx
import bnjax
from bnjax import analysis, inference, training, variants
from bnjax.analysis import losses
from bnjax.inference import describe
from bnjax.models import Perceptron

x, y = jax.random.normal(jax.random.key(0), (16, 4)), jnp.arange(16) % 3
print(bnjax.batch_norm(x, *bnjax.init_batch_norm(4), training=True)[0].shape)
print(variants.batch_renorm(x, *bnjax.init_batch_norm(4), training=True)[0].shape)
print(bnjax.nnx.BatchNorm(4, rngs=nnx.Rngs(0))(x).shape)
model = Perceptron((8,), 3, bnjax.linen.BatchNorm, "before")
state = training.create_train_state(model, optax.sgd(0.1), jax.random.key(0), x)
state, _ = training.make_train_step(training.cross_entropy)(state, x, y)
variables = {"params": state.params, "batch_stats": state.batch_stats}
inference.reestimate_batch_stats(model.apply, variables, [x], training=True)
loss = losses.linen_loss(model, variables, training.cross_entropy, mode="batch")
density = analysis.spectral_density(loss, state.params, x, y, key=jax.random.key(1), num_probes=1, num_steps=4)
print(density.nodes.shape)
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["(16, 4)", "(16, 4)", "(16, 4)", "(1, 4)"]


COMMANDS = {
    ("--help",): 0,
    ("list",): 0,
    ("--version",): 0,
    ("run", "circles", "--help"): 0,
    ("run", "circles"): 2,
    ("run", "mnist"): 2,
    ("claims", "--fast"): 2,
    ("report", "."): 2,
}


@pytest.mark.exhaustive
def test_the_command_line_says_which_extra_is_missing(tmp_path):
    done = run_without_extras(f"""
import contextlib, io, json, os
os.chdir({str(tmp_path)!r})
from bnjax.studies.cli.main import main
outcomes = []
for arguments in {list(COMMANDS)}:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as error:
            code = error.code or 0
    outcomes.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(outcomes))
""")
    assert done.returncode == 0, done.stderr
    for (command, expected), (code, out, err) in zip(COMMANDS.items(), json.loads(done.stdout), strict=True):
        assert code == expected, (command, err)
        if expected == 0:
            assert out and not err
        else:
            assert re.fullmatch(r"bnjax: error: \w+ is not installed: pip install 'bnjax\[studies\]'\n", err), command


@pytest.mark.parametrize("missing", ["sklearn", "tensorflow_datasets", "array_record"])
def test_data_sets_say_what_they_need(missing):
    code = f"""
import sys
sys.modules[{missing!r}] = None
from bnjax.studies import data
try:
    data.images("mnist") if {missing!r} != "sklearn" else data.circles()
except (data.DataError, ModuleNotFoundError) as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'bnjax[data]'" in done.stdout and missing in done.stdout, done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_base_dependencies_are_those_of_its_users_and_have_no_upper_bound():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.match(r"[\w-]+", text)[0] for text in dependencies}
    assert names == {"jax", "flax", "optax", "orbax-checkpoint", "numpy", "jaxtyping"}
    assert all(re.fullmatch(r"[\w-]+>=[\d.]+", text) for text in dependencies)
