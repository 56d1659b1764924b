"""Training: states with running statistics, steps mapped over devices in three ways, epochs, evaluation, meshes.

Checkpoints are in `bnjax.training.checkpoint`, and steps compiled ahead of time in `bnjax.training.ahead_of_time`.
"""

from bnjax._objective import Objective
from bnjax.training.loop import (
    PARALLEL,
    ParallelStep,
    Preprocess,
    evaluate,
    evaluate_in_batches,
    make_train_step,
    train_epoch,
)
from bnjax.training.mesh import (
    GROUP_AXIS,
    HEARTBEAT_SECONDS,
    SYNC_AXIS,
    WAIT_SECONDS,
    batch_sharding,
    index_groups,
    initialize,
    local_part,
    make_mesh,
    num_groups,
    replicate,
    replicated,
    shard_batch,
    stats_sharding,
    to_host,
)
from bnjax.training.parameters import batch_norm_mask, batch_norm_parameters
from bnjax.training.state import (
    TrainState,
    create_train_state,
    merge_batch_stats,
    place_state,
    split_batch_stats,
)
from bnjax.training.step import (
    Batch,
    Metrics,
    binary_cross_entropy,
    cross_entropy,
    gradients,
    pad_batch,
    squared_error,
    train_step,
)

__all__ = [
    "GROUP_AXIS",
    "HEARTBEAT_SECONDS",
    "PARALLEL",
    "SYNC_AXIS",
    "WAIT_SECONDS",
    "Batch",
    "Metrics",
    "Objective",
    "ParallelStep",
    "Preprocess",
    "TrainState",
    "batch_norm_mask",
    "batch_norm_parameters",
    "batch_sharding",
    "binary_cross_entropy",
    "create_train_state",
    "cross_entropy",
    "evaluate",
    "evaluate_in_batches",
    "gradients",
    "index_groups",
    "initialize",
    "local_part",
    "make_mesh",
    "make_train_step",
    "merge_batch_stats",
    "num_groups",
    "pad_batch",
    "place_state",
    "replicate",
    "replicated",
    "shard_batch",
    "split_batch_stats",
    "squared_error",
    "stats_sharding",
    "to_host",
    "train_epoch",
    "train_step",
]
