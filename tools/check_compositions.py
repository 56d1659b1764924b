"""Composes every function and layer with what JAX does: `python tools/check_compositions.py [--page]`.

Each cell of the matrix in `tests/compositions.py`, and the same for Flax's layers, is compared with its definition in
float64. What was found is written to docs/compositions.json, and its table to docs/compositions.md; `--page` writes the
table alone. The whole matrix takes half an hour on two cores.
"""

import json
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECORD, PAGE = (ROOT / "docs" / f"compositions.{ending}" for ending in ("json", "md"))
FIRST = (
    *("flax.linen.BatchNorm", "flax.nnx.BatchNorm", "flax.linen.BatchNorm, mask", "flax.nnx.BatchNorm, mask"),
    *("linen.BatchNorm", "nnx.BatchNorm", "linen.BatchNorm, mask", "nnx.BatchNorm, mask", "batch_norm"),
)
RIGHT = "right"
TEXT = """# Inside other programs

Batch norm is used inside other people's programs: under `vmap` and `scan`, in a checkpointed block, in an exported
function, on a mesh whose axes split the batch, the features or space. Every function and layer was composed with each
of these, and its values (and, where devices, `remat` or strictness are concerned, its gradients) were compared with its
definition in float64: without a mask, and of every function with weights, some of them zero, or a mask. The same was
done with Flax's layers.

"Automatic" is a jitted function of arrays that are split over a mesh of 4 × 2 devices, "explicit" one with JAX's
explicit shardings, "manual" a `shard_map` over both axes with `axis_name`, "partially manual" one over the first axis,
with the second left to XLA or explicit. "Parameters" are split as the features are. The devices are simulated on a CPU.

TABLE

Under a mask Flax's layers average what devices found without asking how many elements each has counted, so that they
are wrong where these numbers differ; ours weigh them.

What was tried is in `tests/compositions.py`; `pytest -m exhaustive tests/test_compositions.py` tries it, and
`python tools/check_compositions.py` makes this table again.

## What holds beside it

- No collective stands under a condition or in a loop. Devices that hold different data can therefore not wait for each
  other forever.
- Training takes at most as many collectives as Flax's layer does, for every way of splitting in the table, in which
  "space" is the first spatial axis and "width" the second one, and under a mask too. XLA does not say how it splits an
  array. Each axis is therefore taken to be split by all devices, and the moments of its parts are merged axis by axis,
  which communicates only along those that are split. Beside those of the batch at most 64 parts are told apart, which
  on at most 8 devices are all parts of two spatial axes; on larger meshes, and with three spatial axes, a split of the
  last one may cost two sums more. Explicit sharding says how an array is split, and then there is no such limit.
- At inference a program holds no primitive that Flax's does not hold, but for `stop_gradient` in `FrozenBatchNorm`, and
  comparisons and selections under a mask, which keep masked NaN out of the gradients of scale and bias.
- `jax.experimental.jet` fails at every function with a derivative rule of its own that is compiled within it, such as
  `jet(jax.jit(jax.nn.relu), …)`; so it does at a compiled batch norm in training. Called directly, as in the table, it
  works.
"""


def main() -> int:
    """Runs the matrix and writes record and page; returns 1 where a cell of ours is not right."""
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return 0
    if "--page" not in sys.argv:
        RECORD.write_text(json.dumps(run(), indent=1) + "\n")
    record = json.loads(RECORD.read_text())
    PAGE.write_text(page(record))
    others = set(record["other"])
    return int(
        any(
            found != RIGHT and f"{row}, {column}" not in others
            for row, cells in record["cells"].items()
            if not row.startswith("flax")
            for column, found in cells.items()
        )
    )


def run() -> dict[str, Any]:
    """Checks all cells; says of each that is not right what it is."""
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    sys.path.insert(0, str(ROOT / "tests"))
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_platforms", "cpu")
    import compositions

    cells: dict[str, dict[str, str]] = {}
    for name, row in {**compositions.FLAX, **compositions.ROWS}.items():
        cells[name] = {}
        for column in compositions.COLUMNS:
            if row.normalizes or column != "export, inference":
                cells[name][column] = outcome(lambda row=row, column=column: compositions.check(row, column))
        wrong = {column: found for column, found in cells[name].items() if found != RIGHT}
        print(f"{name}: {len(cells[name]) - len(wrong)} of {len(cells[name])} right", wrong or "", flush=True)
    versions = {package: metadata.version(package) for package in ("jax", "flax")}
    other = {f"{row}, {column}": reason for (row, column), reason in compositions.OTHER.items()}
    return {"versions": versions, "other": other, "cells": cells}


def outcome(check: Callable[[], Any]) -> str:
    """Says what a cell is."""
    try:
        check()
    except AssertionError:
        return "wrong"
    except Exception as error:
        return type(error).__name__
    return RIGHT


def page(record: dict[str, Any]) -> str:
    """Returns the page with the table of a record."""
    return TEXT.replace("TABLE", table(record))


def table(record: dict[str, Any]) -> str:
    """Returns Markdown of the matrix, the rows of most interest in columns of their own, with notes below."""
    cells = record["cells"]
    others = [row for row in cells if row not in FIRST]
    names = [f"`{name}`{comma}{option}" for name, comma, option in (row.partition(",") for row in FIRST)]
    header = ["", *names, f"the {len(others)} others"]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for column in cells[FIRST[0]]:
        of = [cells[row][column] for row in others if column in cells[row]]
        counted = [record["other"].get(f"{row}, {column}") is None for row in others if column in cells[row]]
        right = sum(found == RIGHT for found in of)
        shown = ["✓" if (found := cells[row][column]) == RIGHT else found for row in FIRST]
        lines.append(f"| {' | '.join([column, *shown, f'{right} of {sum(counted)}'])} |")
    made = " and ".join(f"{package} {version}" for package, version in record["versions"].items())
    reasons: dict[str, list[str]] = {}
    for cell, reason in record["other"].items():
        reasons.setdefault(reason, []).append(cell)
    notes = [f"- {'; '.join(of)}: {reason}." for reason, of in reasons.items()]
    return "\n".join([*lines, "", f"With {made}. Not counted:", "", *notes])


if __name__ == "__main__":
    sys.exit(main())
