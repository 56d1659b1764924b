"""A benchmark of start-up, by processes in turns: what `import bnjax` adds to `import jax`, and `bnjax --help`.

python benchmarks/bench_startup.py [--json startup.json]
"""

import argparse
import statistics
import subprocess
import sys
from typing import Any

from common import device, save, take_turns

PROGRAMS = {
    "python": "pass",
    "import jax": "import jax",
    "import jax, bnjax": "import jax, bnjax",
    "import jax, bnjax.batch_norm": "import jax, bnjax; bnjax.batch_norm",
    "import jax, bnjax.linen": "import jax, bnjax.linen",
    "import jax, flax.linen": "import jax, flax.linen",
    "bnjax --help": "import sys; sys.argv = ['bnjax', '--help']; import bnjax.studies.cli.main as m; m.main()",
    "bnjax run circles --help": "import sys; sys.argv = ['bnjax', 'run', 'circles', '--help']; "
    "import bnjax.studies.cli.main as m; m.main()",
}


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Computes the numbers that the goals ask for."""

    def median(name: str) -> float:
        return statistics.median(seconds[name])

    jax = median("import jax") - median("python")
    added = {name: (median(name) - median("import jax")) / jax for name in seconds if name.startswith("import jax, ")}
    return {
        "added to import jax, as a share of it": added,
        "import bnjax adds under 50 ms": median("import jax, bnjax") - median("import jax") < 0.05,
        "bnjax --help takes under 0.5 s": median("bnjax --help") < 0.5,
        "bnjax --help to import jax": median("bnjax --help") / median("import jax"),
    }


def main() -> None:
    """Prints the summary; with --json it saves the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="processes of each program (default %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="save the numbers")
    options = parser.parse_args()
    calls = {
        name: lambda program=program: subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
        for name, program in PROGRAMS.items()
    }
    seconds = take_turns(calls, options.rounds, warm_up=1)
    results = summary(seconds)
    for name, value in results.items():
        print(f"{name}: {value}")
    save(options.json, {"device": device(), "seconds": seconds, "summary": results})


if __name__ == "__main__":
    main()
