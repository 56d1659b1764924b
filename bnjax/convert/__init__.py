"""Batch norms and whole models of other frameworks as Flax variables, and back, without importing any framework."""

from bnjax.convert.arrays import read_arrays, save_safetensors
from bnjax.convert.equinox import (
    batch_norm_from_equinox,
    batch_norm_to_equinox,
    variables_from_equinox,
    variables_to_equinox,
)
from bnjax.convert.haiku import batch_norm_from_haiku, batch_norm_to_haiku, variables_from_haiku, variables_to_haiku
from bnjax.convert.keras import batch_norm_from_keras, batch_norm_to_keras, variables_from_keras, variables_to_keras
from bnjax.convert.nnx import batch_norm_from_nnx, batch_norm_to_nnx, variables_from_nnx, variables_to_nnx
from bnjax.convert.state import BatchNormState
from bnjax.convert.torch import (
    batch_norm_from_torch,
    batch_norm_to_torch,
    torchvision_names,
    variables_from_torch,
    variables_to_torch,
)

__all__ = [
    "BatchNormState",
    "batch_norm_from_equinox",
    "batch_norm_from_haiku",
    "batch_norm_from_keras",
    "batch_norm_from_nnx",
    "batch_norm_from_torch",
    "batch_norm_to_equinox",
    "batch_norm_to_haiku",
    "batch_norm_to_keras",
    "batch_norm_to_nnx",
    "batch_norm_to_torch",
    "read_arrays",
    "save_safetensors",
    "torchvision_names",
    "variables_from_equinox",
    "variables_from_haiku",
    "variables_from_keras",
    "variables_from_nnx",
    "variables_from_torch",
    "variables_to_equinox",
    "variables_to_haiku",
    "variables_to_keras",
    "variables_to_nnx",
    "variables_to_torch",
]
