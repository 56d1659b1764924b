"""bnjax: batch normalisation for JAX as a pure function, with Flax layers and the studies of why it works."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnjax._moments import Moments, merge_moments, moments
    from bnjax._remat import save_batch_norm_inputs
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

_HOMES = dict.fromkeys(__all__, "bnjax.norm")
_HOMES |= dict.fromkeys(("Moments", "merge_moments", "moments"), "bnjax._moments")
_HOMES["save_batch_norm_inputs"] = "bnjax._remat"


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that `bnjax --help` does without JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
