"""All that differs between versions of JAX and Flax; the rest of bnjax is written for their newest versions."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import lax
from jax.core import Tracer


def varying_axes(x: Any) -> frozenset[str]:
    """Returns the mesh axes over which shard_map's replication checking types an array as varying."""
    kind = jax.typeof(x)
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma  # jax 0.9 and older


def as_varying(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Types `x` as varying over mesh axes over which it does not vary."""
    if hasattr(lax, "pcast"):
        return lax.pcast(x, axes, to="varying")
    return lax.pvary(x, axes)  # pyright: ignore[reportAttributeAccessIssue]  # jax 0.7


def is_in_jet(x: Any) -> bool:
    """Returns whether `jax.experimental.jet` is expanding `x`, maybe within vmap or jvp.

    It fails at functions with rules of their own, as at relu. Ours are then called without their rules, which it would
    leave aside in any case.
    """
    while isinstance(x, Tracer) and type(x).__module__ != "jax.experimental.jet":
        x = getattr(x, "val", getattr(x, "primal", None))
    return isinstance(x, Tracer)


def check_pmap() -> None:
    """Raises `NotImplementedError` for jax 0.7, whose pmap does not serve within a jitted program over a mesh."""
    if jax.__version_info__ < (0, 8):
        raise NotImplementedError(
            f"parallel='pmap' needs jax 0.8 or newer, this is {jax.__version__}. Use 'shard_map' or 'jit', which train "
            "the same."
        )


def enable_x64(enabled: bool = True) -> contextlib.AbstractContextManager:
    """Enables JAX's 64-bit types, or disables them, within a `with` statement."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(enabled)
    from jax import experimental  # jax 0.7

    return experimental.enable_x64(enabled)  # pyright: ignore[reportAttributeAccessIssue]


def without_fusion_emitters() -> dict[str, bool]:
    """Returns XLA's options for compiling faster on CPU; none since jax 0.11, which lacks the option."""
    return {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}


def iter_modules(model: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yields the paths and modules of an nnx model, itself included."""
    from flax import nnx

    return nnx.iter_modules(model) if hasattr(nnx, "iter_modules") else model.iter_modules()  # Flax 0.11


def promotion_of_ones_own(layer: Any) -> Callable[..., Any] | None:
    """Returns the `promote_dtype` that an nnx layer was given; None for Flax's own and in Flax 0.11, which has none."""
    from flax.nnx.nn import dtypes

    promote = getattr(layer, "promote_dtype", dtypes.promote_dtype)
    return None if promote is dtypes.promote_dtype else promote


def result_dtype(layer: Any, x: Any, mean: Any, var: Any, scale: Any, bias: Any) -> Any:
    """Returns the dtype that the installed Flax gives an nnx batch norm's result: since 0.12 the statistics' counts."""
    from flax.nnx.nn import dtypes

    statistics = (mean, var) if hasattr(layer, "promote_dtype") else ()
    return dtypes.canonicalize_dtype(x, *statistics, scale, bias, dtype=layer.dtype)


def get_value(variable: Any) -> Any:
    """Returns the value of an nnx variable, an array or any other."""
    return variable.get_value() if hasattr(variable, "get_value") else variable.value  # Flax 0.11


def set_value(variable: Any, value: Any) -> None:
    """Gives an nnx variable a value, of any dtype."""
    if hasattr(variable, "set_value"):
        variable.set_value(value)
    else:  # Flax 0.11
        variable.value = value


def promoted(layer: Any, x: Any, kernel: Any, bias: Any) -> Any:
    """Returns the input of an nnx layer in the dtype in which the layer computes."""
    from flax.nnx.nn import dtypes

    return getattr(layer, "promote_dtype", dtypes.promote_dtype)((x, kernel, bias), dtype=layer.dtype)[0]
