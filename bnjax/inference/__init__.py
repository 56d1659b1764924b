"""Inference: batch norms folded into their neighbors, and statistics of the data in place of running averages."""

from bnjax.inference.description import Description, Mistake, describe, examine
from bnjax.inference.fold_model import fold_model, foldable_pairs
from bnjax.inference.folding import fold, fold_before
from bnjax.inference.reestimate import adapt_batch_stats, reestimate_batch_stats

__all__ = [
    "Description",
    "Mistake",
    "adapt_batch_stats",
    "describe",
    "examine",
    "fold",
    "fold_before",
    "fold_model",
    "foldable_pairs",
    "reestimate_batch_stats",
]
