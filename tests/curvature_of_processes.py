"""Measures a sharded network's curvature as one of several processes, for test_operators_on_meshes.py.

python curvature_of_processes.py PROCESS_ID PROCESSES PORT: prints what was measured as JSON.
"""

import json
import sys

import jax

process, processes, port = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4 // processes)

from bnjax import training  # noqa: E402

if processes > 1:
    training.initialize(f"127.0.0.1:{port}", processes, process, heartbeat_seconds=10)

import numpy as np  # noqa: E402
import sharded_network as network  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def everywhere(value, spec):
    """An array over the devices of all processes, of whose parts each process has its own."""
    return jax.make_array_from_callback(value.shape, NamedSharding(mesh, spec), lambda index: value[index])


class Loader:
    """A data set that each process reads for itself."""

    def __iter__(self):
        for part in network.PARTS:
            yield tuple(everywhere(v[part], P("data")) for v in (network.X, network.Y))


params = {name: everywhere(value, network.SPECS[name]) for name, value in network.PARAMS.items()}
found = network.measured(params, {"batches": Loader()}, few=True)
vectors = found.pop("vectors")
shards = {name: sorted({shard.data.shape for shard in value.addressable_shards}) for name, value in vectors.items()}
print(json.dumps({**{name: np.asarray(value).tolist() for name, value in found.items()}, "shards": shards}), flush=True)
