"""bnjax: batch normalisation for JAX as a pure function, with Flax layers and the studies of why it works."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnjax._moments import Moments, merge_moments, moments
    from bnjax.norm import batch_norm, init_batch_norm, update_batch_stats

__version__ = "0.1.0"

__all__ = ["Moments", "batch_norm", "init_batch_norm", "merge_moments", "moments", "update_batch_stats"]

_HOMES = {
    name: "bnjax._moments" if name in ("Moments", "merge_moments", "moments") else "bnjax.norm" for name in __all__
}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that `bnjax --help` does without JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
