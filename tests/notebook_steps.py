"""Compiles for TPU chips that are not at hand whatever the notebooks jit: `python tests/notebook_steps.py [NAME …]`.

A notebook is run at a small size, as plain Python, on one CPU device and on eight simulated ones. Every call of a
jitted function of bnjax or of the notebook is remembered, and afterwards its function is traced again and compiled by
TPU's own compiler (`pip install 'bnjax[tpu]'`) for a slice of as many v5e chips: what lies on a mesh of CPU devices in
the notebook lies on the mesh of the chips then. `jax.pmap` alone can't be compiled for devices that are not at hand.
"""

import contextlib
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
TOPOLOGIES = {1: "v5e:1x1", 8: "v5e:2x4"}


def small(notebook: Any) -> Any:
    """Returns a notebook with the sizes of a short run: what cells' metadata 'smoke' has comes after their own code."""
    for cell in notebook["cells"]:
        if "smoke" in cell["metadata"]:
            cell["source"] = "".join(cell["source"]) + "\n" + cell["metadata"]["smoke"]
    return notebook


class Call(NamedTuple):
    """A first call of a jitted function with arguments of these shapes."""

    name: str
    function: Callable[..., Any]
    options: dict[str, Any]
    arguments: tuple
    keywords: dict[str, Any]


class _Mapped(Exception):
    """The function is mapped by pmap."""


class _Collector:
    """Stands in for `jax.jit` and what places arrays: remembers calls, and compiles them for `chips`."""

    def __init__(self):
        import jax

        self.calls: dict[Any, Call] = {}
        self.chips: list[Any] = []
        self._jit, self._shard_map, self._pmap = jax.jit, jax.shard_map, jax.pmap
        self._constrain = jax.lax.with_sharding_constraint

    def patches(self) -> contextlib.ExitStack:
        """Puts itself in the place of JAX's functions."""
        import jax

        stack = contextlib.ExitStack()
        for module, name, function in (
            (jax, "jit", self.jit),
            (jax, "shard_map", self.shard_map),
            (jax, "pmap", self.pmap),
            (jax.lax, "with_sharding_constraint", lambda x, place: self._constrain(x, self.on_chips(place))),
        ):
            stack.enter_context(mock.patch.object(module, name, function))
        return stack

    def jit(self, function: Any = None, **options: Any) -> Any:
        """`jax.jit`, whose functions remember with what they are called."""
        return functools.partial(self.jit, **options) if function is None else _Jitted(function, options, self)

    def jitted(self, function: Any, options: dict[str, Any]) -> Any:
        """By `jax.jit` itself."""
        return self._jit(function, **options)

    def shard_map(self, function: Any = None, **options: Any) -> Any:
        """`jax.shard_map`, over the chips when it is traced for them."""
        if function is None:
            return functools.partial(self.shard_map, **options)
        return lambda *values: self._shard_map(function, **{**options, "mesh": self.on_chips(options["mesh"])})(*values)

    def pmap(self, *arguments: Any, **options: Any) -> Any:
        """`jax.pmap`, which can't be traced for devices that are not at hand."""
        mapped = self._pmap(*arguments, **options)

        def call(*values: Any) -> Any:
            if self.chips:
                raise _Mapped
            return mapped(*values)

        return call

    def on_chips(self, place: Any) -> Any:
        """A mesh or sharding with the chips in the place of the CPU's devices, if there are chips."""
        from jax.sharding import Mesh, NamedSharding

        if isinstance(place, NamedSharding):
            return NamedSharding(self.on_chips(place.mesh), place.spec)
        if isinstance(place, Mesh) and self.chips and place.devices.flat[0].platform == "cpu":
            devices = np.array(self.chips[: place.size]).reshape(place.devices.shape)
            return Mesh(devices, place.axis_names, axis_types=place.axis_types)
        return place

    def compile(self, call: Call, topology: str) -> str:
        """Compiles a call for a slice and says how that went: 'compiled', 'mapped by pmap', or an error."""
        import jax
        from jax.sharding import Mesh, NamedSharding

        from bnjax.training.ahead_of_time import topology_devices

        self.chips = topology_devices(topology)
        jax.clear_caches()
        meshes = [leaf.sharding.mesh for leaf in jax.tree.leaves((call.arguments, call.keywords)) if _is_spread(leaf)]
        # What is on no mesh runs alike on every chip.
        mesh = self.on_chips(meshes[0]) if meshes else Mesh(np.array(self.chips), ("all",))

        def moved(leaf: Any) -> Any:
            if not isinstance(leaf, jax.ShapeDtypeStruct):
                return leaf
            place = self.on_chips(leaf.sharding) if _is_spread(leaf) else NamedSharding(mesh, jax.P())
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

        arguments, keywords = jax.tree.map(moved, (call.arguments, call.keywords))
        again = functools.wraps(call.function)(lambda *a, **k: call.function(*a, **k))  # else its old trace would do
        try:
            self.jitted(again, call.options).lower(*arguments, **keywords).compile()
        except _Mapped:
            return "mapped by pmap"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            self.chips = []
        return "compiled"


class _Jitted:
    """A jitted function that remembers with what it is called."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any], collector: _Collector):
        functools.update_wrapper(self, function, updated=())
        self._function, self._options, self._collector = function, options, collector
        self._jitted = collector.jitted(function, options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        import jax

        leaves, tree = jax.tree.flatten((arguments, keywords))
        name = getattr(self._function, "__qualname__", repr(self._function))
        is_ours = getattr(self._function, "__module__", "").startswith(("bnjax", "notebook"))
        if is_ours and not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            shapes = tuple((leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf for leaf in leaves)
            call = Call(name, self._function, self._options, *jax.tree.map(_abstract, (arguments, keywords)))
            self._collector.calls.setdefault((name, tree, str(shapes)), call)
        return self._jitted(*arguments, **keywords)


def _is_spread(leaf: Any) -> bool:
    return type(getattr(leaf, "sharding", None)).__name__ == "NamedSharding"


def _abstract(leaf: Any) -> Any:
    """An array's shape, dtype and place; anything else as it is, such as a static argument."""
    import jax

    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, np.ndarray | np.generic) else leaf


def _code(cell: dict[str, Any]) -> str:
    """A cell's source, with `pass` for each line that is IPython's."""
    lines = "".join(cell["source"]).splitlines()
    return "\n".join(f"{line[: -len(line.lstrip())]}pass" if line.lstrip().startswith("%") else line for line in lines)


def run(name: str, devices: int) -> dict[str, str]:
    """Name of each function that a notebook jits, with its number, to how its compilation went."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    update = jax.config.update

    def keep_devices(option: str, value: Any) -> None:
        if option != "jax_num_cpu_devices":
            update(option, value)

    collector = _Collector()
    cells = small(json.loads((NOTEBOOKS / f"{name}.ipynb").read_text()))["cells"]
    with collector.patches(), mock.patch.object(jax.config, "update", keep_devices):
        space = {"__name__": "notebook"}
        for number, cell in enumerate(cells):
            if cell["cell_type"] == "code":
                exec(compile(_code(cell), f"{name}, cell {number}", "exec"), space)
        calls = list(collector.calls.values())
        return {f"{i}: {c.name}": collector.compile(c, TOPOLOGIES[devices]) for i, c in enumerate(calls)}


def main(names: list[str]) -> int:
    """Prints how each program of the notebooks compiles; each runs in a process of its own."""
    failed = 0
    for name in names or sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")):
        for devices, topology in TOPOLOGIES.items():
            command = [sys.executable, __file__, "--one", name, str(devices)]
            ran = subprocess.run(command, capture_output=True, text=True)
            found = json.loads(ran.stdout.splitlines()[-1]) if ran.returncode == 0 else {"all": ran.stderr[-2000:]}
            bad = {key: value for key, value in found.items() if value not in ("compiled", "mapped by pmap")}
            failed += len(bad)
            counts = {value: list(found.values()).count(value) for value in ("compiled", "mapped by pmap")}
            print(
                f"{name}, {topology}: {counts['compiled']} programs compiled, {counts['mapped by pmap']} mapped by pmap"
            )
            for key, value in bad.items():
                print(f"  {key}: {value}")
    return int(failed > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(run(sys.argv[2], int(sys.argv[3]))))
    else:
        sys.exit(main(sys.argv[1:]))
