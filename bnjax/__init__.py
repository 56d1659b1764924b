"""bnjax: batch normalization for JAX as a pure function, with Flax layers and the studies of why it works."""

import importlib
import importlib.util
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnjax._moments import moments
    from bnjax._remat import save_batch_norm_inputs
    from bnjax._sync import Moments, merge_moments
    from bnjax.norm import batch_norm, init_batch_norm, update_batch_stats

__version__ = "0.1.0"

__all__ = [
    "Moments",
    "batch_norm",
    "init_batch_norm",
    "merge_moments",
    "moments",
    "save_batch_norm_inputs",
    "update_batch_stats",
]

# Where the public names are. They are imported when they are first used, so that `bnjax --help` need not wait for JAX.
_MODULES = {
    "Moments": "_sync",
    "batch_norm": "norm",
    "init_batch_norm": "norm",
    "merge_moments": "_sync",
    "moments": "_moments",
    "save_batch_norm_inputs": "_remat",
    "update_batch_stats": "norm",
}

# Names that users may look for in `bnjax` itself, by the modules that hold them.
_ELSEWHERE = {
    "bnjax.linen and bnjax.nnx": (
        "BatchNorm", "BatchRenorm", "FrozenBatchNorm", "GhostBatchNorm", "LpBatchNorm", "MovingBatchNorm",
        "NoisyBatchNorm", "SplitBatchNorm",
    ),
    "bnjax.variants": (
        "batch_renorm", "frozen_batch_norm", "ghost_batch_norm", "lp_batch_norm", "moving_batch_norm",
        "noisy_batch_norm", "split_batch_norm",
    ),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports a public name, or a module such as `bnjax.linen`, when it is first used."""
    if name in _MODULES:
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
        return globals().setdefault(name, getattr(module, name))
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    message = f"module {__name__!r} has no attribute {name!r}"
    for modules, names in _ELSEWHERE.items():
        if name in names:
            message += f"; it is in {modules}: from {modules.split()[0]} import {name}"
    raise AttributeError(message)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *(module.name for module in pkgutil.iter_modules(__path__))})
