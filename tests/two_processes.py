"""Trains a small network as one of several processes, for test_network.py: prints its curves as JSON.

python two_processes.py PROCESS_ID PROCESSES PORT PARALLEL [STEP at which process 1 dies]
"""

import json
import os
import sys

import jax

process, processes, port, way = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
dies_at = int(sys.argv[5]) if len(sys.argv) > 5 else None
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4 // processes)

from bnjax import training  # noqa: E402

if processes > 1:
    training.initialize(f"127.0.0.1:{port}", processes, process, heartbeat_seconds=10)

import network_example  # noqa: E402

from bnjax.studies import ParallelOptions  # noqa: E402


class Report:
    """Ends process 1 without a word at a step."""

    def expect(self, count):
        pass

    def task(self, plan):
        def update(epoch, means):
            if dies_at is not None and process == 1 and epoch * network_example.STEPS >= dies_at:
                os._exit(9)

        return update

    def reading(self, text, fraction):
        pass


try:
    trained = network_example.train(ParallelOptions(1, parallel=way), Report())
except Exception as error:
    print(f"bnjax: error: {error}", file=sys.stderr, flush=True)
    os._exit(3)
print(json.dumps({name: curve.tolist() for name, curve in trained.curves.items()}), flush=True)
