"""Frameworks' names of arrays and layouts of kernels, and the exchange of variables by these."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.convert.arrays import as_numpy

Arrays = Mapping[str, Any]
Names = Mapping[str, str] | Callable[[str], str | None] | None
"""The framework's name of a module by our path of it, such as 'block/Conv_0'; None for our path with its separator."""


_MOST = 50  # names in a message


class Framework(NamedTuple):
    """The names and layouts of a framework. Ours are Flax's, with kernels [*window, in, out].

    Attributes:
      title: name of the framework in messages.
      separator: text between the names of a module and of its parts.
      leaves: names of arrays by ours; 'linear bias' is the bias beside a kernel, 'bias' any other.
      ignored: names of arrays without a counterpart in ours.
      out_first: whether kernels are [out, in, *window].
      transposed_swaps: whether 'in' and 'out' change places in the kernels of transposed convolutions.
      transposed_flips: whether these kernels' windows are reversed.
      depthwise_apart: whether depthwise kernels are [*window, in, multiplier], ours [*window, 1, in · multiplier].
    """

    title: str
    separator: str
    leaves: Mapping[str, str]
    ignored: Collection[str] = ()
    out_first: bool = False
    transposed_swaps: bool = False
    transposed_flips: bool = False
    depthwise_apart: bool = False

    def key(self, module: str, leaf: str) -> str:
        """Returns the framework's full name of an array."""
        return f"{module}{self.separator}{self.leaves[leaf]}" if module else self.leaves[leaf]

    def kernel_to_ours(self, kernel: np.ndarray, transposed: bool) -> np.ndarray:
        """Returns a kernel in our layout."""
        kernel = np.moveaxis(kernel, (0, 1), (-1, -2)) if self.out_first else kernel
        return self._transposed(kernel) if transposed else kernel

    def kernel_to_theirs(self, kernel: np.ndarray, transposed: bool) -> np.ndarray:
        """Returns a kernel in the framework's layout."""
        kernel = self._transposed(kernel) if transposed else kernel
        return np.moveaxis(kernel, (-1, -2), (0, 1)) if self.out_first else kernel

    def fits(self, shape: tuple[int, ...], expected: tuple[int, ...], is_kernel: bool) -> bool:
        """Returns whether a shape is as expected, up to axes of size one in vectors, and in depthwise kernels."""
        if not is_kernel:
            return _sizes(shape) == _sizes(expected)
        if shape == expected or not self.depthwise_apart or len(shape) < 3:
            return shape == expected
        pairs = (shape[-2:], expected[-2:])
        return shape[:-2] == expected[:-2] and math.prod(pairs[0]) == math.prod(pairs[1]) and 1 in (p[0] for p in pairs)

    def _transposed(self, kernel: np.ndarray) -> np.ndarray:
        kernel = np.swapaxes(kernel, -1, -2) if self.transposed_swaps else kernel
        return np.flip(kernel, tuple(range(kernel.ndim - 2))) if self.transposed_flips else kernel


class _Leaf(NamedTuple):
    """An array of ours: its path, its value or its shape, and whether it is a (transposed convolution's) kernel."""

    path: str
    value: Any
    is_kernel: bool
    is_transposed: bool


class _Problems(dict[str, list[str]]):
    """The lists of problems by kind, raised as one message."""

    def add(self, kind: str, names: Iterable[str]) -> None:
        self.setdefault(kind, []).extend(names)

    def check(self, framework: Framework) -> None:
        lines = [f"  {kind}: {_listed(names)}" for kind, names in self.items() if names]
        if lines:
            raise ValueError(
                f"{framework.title}'s arrays and ours must agree in names and shapes, got\n" + "\n".join(lines) + "\n"
                "Correct `names` or the model, or leave out what is not wanted."
            )


def variables_from(framework: Framework, theirs: Arrays, like: Any, names: Names, transposed: Collection[str]) -> Any:
    """Returns a framework's arrays as variables of the structure, shapes and dtypes of `like`."""
    leaves, problems = _leaves(framework, like, names, transposed)
    expected = {}
    for key, leaf in leaves.items():
        shape = np.broadcast_to(np.zeros(()), leaf.value.shape)  # takes no memory
        expected[key] = framework.kernel_to_theirs(shape, leaf.is_transposed) if leaf.is_kernel else shape
    matched = _matched(framework, theirs, expected, leaves, problems)
    values = []
    for key, leaf in leaves.items():
        value = framework.kernel_to_ours(matched[key], leaf.is_transposed) if leaf.is_kernel else matched[key]
        values.append(jnp.array(value, leaf.value.dtype))  # a copy, as the framework's array may be changed in place
    return jax.tree.unflatten(jax.tree.structure(like), values)


def variables_to(
    framework: Framework,
    variables: Any,
    names: Names,
    transposed: Collection[str] = (),
    template: Arrays | None = None,
) -> dict[str, np.ndarray]:
    """Returns our variables as a framework's arrays by its names, in the shapes and dtypes of `template` if given."""
    leaves, problems = _leaves(framework, variables, names, transposed)
    arrays = {}
    for key, leaf in leaves.items():
        value = np.asarray(leaf.value)
        value = framework.kernel_to_theirs(value, leaf.is_transposed) if leaf.is_kernel else value
        arrays[key] = np.array(value, order="C")  # writable and contiguous, as PyTorch wants it
    if template is None:
        problems.check(framework)
        return arrays
    matched = _matched(framework, arrays, template, leaves, problems)
    return {key: value.astype(template[key].dtype) for key, value in matched.items()}


def batch_norm_from(framework: Framework, theirs: Arrays, name: str = "") -> tuple[dict, dict]:
    """Returns the params and batch_stats of a framework's batch norm, without leading axes of size one."""
    keys = {leaf: framework.key(name, leaf) for leaf in ("scale", "bias", "mean", "var")}
    missing = [keys[leaf] for leaf in ("mean", "var") if keys[leaf] not in theirs]
    if missing:
        near = sorted(key for key in theirs if key.startswith(name)) or sorted(theirs)
        raise ValueError(
            f"{framework.title}'s batch norm {name!r} must have {' and '.join(missing)}, got the arrays "
            f"{', '.join(near[:20]) or 'of none'}. Pass the name of a batch norm that keeps running statistics."
        )
    found = {leaf: _stripped(as_numpy(theirs[key])) for leaf, key in keys.items() if key in theirs}
    for leaf, value in found.items():
        if not jnp.issubdtype(value.dtype, jnp.inexact) or (leaf == "var" and not np.isrealobj(value)):
            raise ValueError(f"{framework.title}'s {keys[leaf]} must be of floating-point numbers, got {value.dtype}.")
    if (found["var"] < 0).any():
        raise ValueError(f"{framework.title}'s {keys['var']} must be at least 0, got {found['var'].min()}.")
    arrays = {leaf: jnp.array(value) for leaf, value in found.items()}
    shapes = {keys[leaf]: value.shape for leaf, value in arrays.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{framework.title}'s batch norm {name!r} must have arrays of one shape, got {shapes}.")
    params = {leaf: arrays[leaf] for leaf in ("scale", "bias") if leaf in arrays}
    return params, {leaf: arrays[leaf] for leaf in ("mean", "var")}


def _leaves(
    framework: Framework, variables: Any, names: Names, transposed: Collection[str]
) -> tuple[dict[str, _Leaf], _Problems]:
    """Returns our arrays by the framework's names, in the order of the tree, and the problems with these."""
    if not (isinstance(variables, Mapping) and set(variables) <= {"params", "batch_stats"}):
        raise ValueError(
            "The variables must be a mapping of 'params' and 'batch_stats' alone, got "
            f"{sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__}. "
            "Pass what model.init gives, without other collections."
        )
    flat = []
    for entries, value in jax.tree_util.tree_flatten_with_path(variables)[0]:
        flat.append((tuple(str(e.key) for e in entries if hasattr(e, "key")), value))
    linear = {path[:-1] for path, _ in flat if path[-1] == "kernel"}
    leaves, problems = {}, _Problems()
    for path, value in flat:
        module, leaf = "/".join(path[1:-1]), path[-1]
        name = _name(framework, names, module)
        kind = "linear bias" if leaf == "bias" and path[:-1] in linear else leaf
        if name is None:
            if module not in problems.get(unnamed := "modules without a name in `names`", ()):
                problems.add(unnamed, [module])
        elif kind not in framework.leaves:
            problems.add("arrays of ours without a counterpart", ["/".join(path)])
        elif (key := framework.key(name, kind)) in leaves:
            problems.add("names that two modules have", [f"{key} ({leaves[key].path} and {'/'.join(path)})"])
        else:
            is_transposed = path[-2].startswith("ConvTranspose") or module in transposed
            leaves[key] = _Leaf("/".join(path), value, leaf == "kernel", is_transposed)
    return leaves, problems


def _prefix_of(unused: Collection[str], missing: Collection[str]) -> list[str]:
    """Returns what is to be taken away from the names of unused arrays so that all missing ones are among them."""
    longest, of_unused = max(missing, key=len, default=""), set(unused)
    for name in unused:
        prefix = name.removesuffix(longest)
        if longest and prefix != name and all(prefix + other in of_unused for other in missing):
            return [repr(prefix)]
    return []


def _matched(
    framework: Framework, arrays: Arrays, expected: Arrays, leaves: Mapping[str, _Leaf], problems: _Problems
) -> dict[str, np.ndarray]:
    """Returns `arrays` in the shapes of `expected`, which must hold the same names but for those that are ignored."""

    def without_ignored(keys):
        return sorted(key for key in keys if key.split(framework.separator)[-1] not in framework.ignored)

    missing = set(without_ignored(expected.keys() - arrays.keys()))
    problems.add("missing", [f"{k} (for {leaves[k].path})" if k in leaves else k for k in sorted(missing)])
    unused = without_ignored(arrays.keys() - expected.keys())
    problems.add("unused", unused)
    problems.add("the missing ones are among the unused, with the prefix", _prefix_of(unused, missing))
    matched = {}
    for key in expected.keys() & arrays.keys():
        value, shape = as_numpy(arrays[key]), np.shape(expected[key])
        if not jnp.issubdtype(value.dtype, jnp.number):
            problems.add("arrays that are none of numbers", [f"{key} is of {value.dtype}"])
        elif np.iscomplexobj(value) and not jnp.issubdtype(leaves[key].value.dtype, jnp.complexfloating):
            problems.add("complex arrays where ours are real", [key])
        elif _is_negative(leaves[key], value):
            problems.add("negative variances", [key])
        elif framework.fits(value.shape, shape, leaves[key].is_kernel):
            matched[key] = value.reshape(shape)
        else:
            problems.add("wrong shapes", [f"{key} is {value.shape}, expected {shape} ({leaves[key].path})"])
    problems.check(framework)
    return matched


def _name(framework: Framework, names: Names, module: str) -> str | None:
    if names is None:
        return module.replace("/", framework.separator)
    return names.get(module) if isinstance(names, Mapping) else names(module)


def _is_negative(leaf: _Leaf, value: np.ndarray) -> bool:
    is_variance = leaf.path.startswith("batch_stats/") and leaf.path.endswith("var")
    return is_variance and np.isrealobj(value) and bool((value < 0).any())


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_MOST]) + (f", and {len(names) - _MOST:,} more" if len(names) > _MOST else "")


def _sizes(shape: tuple[int, ...]) -> list[int]:
    """Returns a shape without its axes of size one, which frameworks add to vectors for broadcasting."""
    return [size for size in shape if size != 1]


def _stripped(value: np.ndarray) -> np.ndarray:
    while value.ndim > 1 and value.shape[0] == 1:
        value = value[0]
    return value
