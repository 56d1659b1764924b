"""Variants of batch norm, with its signature and state."""

from bnjax.variants.frozen import frozen_batch_norm
from bnjax.variants.ghost import ghost_batch_norm
from bnjax.variants.lp import lp_batch_norm
from bnjax.variants.moving import moving_batch_norm
from bnjax.variants.noisy import noisy_batch_norm
from bnjax.variants.renorm import batch_renorm
from bnjax.variants.split import init_split_batch_norm, split_batch_norm

__all__ = [
    "batch_renorm",
    "frozen_batch_norm",
    "ghost_batch_norm",
    "init_split_batch_norm",
    "lp_batch_norm",
    "moving_batch_norm",
    "noisy_batch_norm",
    "split_batch_norm",
]
