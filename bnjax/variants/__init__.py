"""Batch norm's relatives, with its signature and state: renormalised, with noise, with an l_p norm."""

from bnjax.variants.lp import lp_batch_norm
from bnjax.variants.noisy import noisy_batch_norm
from bnjax.variants.renorm import batch_renorm

__all__ = ["batch_renorm", "lp_batch_norm", "noisy_batch_norm"]
