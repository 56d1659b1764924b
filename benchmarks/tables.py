"""The tables of all benchmarks: each benchmark prints its own, and tools/make_performance.py puts them on the page."""

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from common import KNOWN_MEAN, PEERS, spread

from bnjax.studies.evidence.results import markdown_table

BOUND = 1.2e-4  # 1000 deviations times the spacing of float32, which is the cost of rounding the input itself


def ratios(measurement: dict[str, Any], peer: str) -> list[float]:
    """Returns the ratios of bnjax's time to a peer's, round by round."""
    seconds = measurement["seconds"]
    return [a / b for a, b in zip(seconds["bnjax"], seconds[peer], strict=True)]


def accurate(measurement: dict[str, Any], peer: str) -> bool:
    """Returns whether a peer's errors are below the bound even for a large mean, or in bfloat16 below twice bnjax's."""
    if "hard errors" in measurement:
        return max(measurement["hard errors"][peer]) <= BOUND
    return all(a <= 2 * b for a, b in zip(measurement["errors"][peer], measurement["errors"]["bnjax"], strict=True))


def operation(results: dict[str, Any], title: str) -> str:
    """Returns a table of the operation for each direction."""
    peers = [peer for peer in PEERS if any(peer in measurement["seconds"] for measurement in results["measured"])]
    parts = []
    for backward in (False, True):
        rows, knows_mean = [], False
        for measurement in results["measured"]:
            if measurement["backward"] == backward:
                limit = statistics.median(measurement["seconds"]["bnjax"]) / measurement["limit"]
                cells = [cell(measurement, peer) if peer in measurement["seconds"] else "" for peer in peers]
                if knows_mean := KNOWN_MEAN in measurement["seconds"]:
                    cells.append(f"{statistics.median(ratios(measurement, KNOWN_MEAN)):.2f}")
                rows.append(["×".join(map(str, measurement["shape"])), *cells, f"{limit:.2f}"])
        direction = "Forward + backward" if backward else "Forward"
        head = ["shape", *peers, *([KNOWN_MEAN] if knows_mean else []), "to the limit"]
        parts += [f"{direction}, {title}:", markdown_table(head, rows)]
    return "\n\n".join(parts)


def cell(measurement: dict[str, Any], peer: str) -> str:
    """Returns a ratio as text, in parentheses where the peer is not accurate."""
    text = f"{statistics.median(ratios(measurement, peer)):.2f}"
    return text if accurate(measurement, peer) else f"({text})"


def memory(results: Any) -> str:
    """Returns a table of the memory that is kept for the backward pass."""
    cells = [[r["norm"], r["dtype"], f"{r['kept']:.2f}", f"{r['growth']:.2f}"] for r in results["measured"]]
    return markdown_table(["batch norm + ReLU", "dtype", "kept", "a further block, compiled on CPU"], cells)


def training(results: Any) -> str:
    """Returns a table of the networks' steps."""
    columns = [measurement["ratios"] for measurement in results["measured"]]
    head = ["", *(f"{measurement['network']}, {measurement['batch']} images" for measurement in results["measured"])]
    return markdown_table(head, [[name, *(spread(c[name]) for c in columns)] for name in columns[0]])


def studies(measured: list[dict[str, Any]]) -> str:
    """Returns a table of the studies."""
    rows = []
    for measurement in measured:
        for backend, by_kind in measurement["ratios"].items():
            turns = [by_kind.get(kind, []) for kind in ("cold", "cached", "warm")]
            cells = [spread(v, 1) if len(v) > 1 else "".join(f"{ratio:.1f}" for ratio in v) for v in turns]
            rows.append([measurement["study"], f"Keras on {backend}", *cells])
    return markdown_table(["study", "against", "cold", "with a cache", "warm"], rows)


def convolution(result: dict[str, Any]) -> str:
    """Makes the table of the ways to convolve, but for the one to which the others are compared."""
    ways = ["XLA's convolution", "windows"]
    heads = {"windows": "windows alone"}
    rows = [[network, *(spread(of[way]) for way in ways)] for network, of in result["ratios"].items()]
    return markdown_table(["study's network", *(heads.get(way, way) for way in ways)], rows)


def growth(results: Any) -> str:
    """Returns a table of the exponents of growth."""
    rows = [
        [
            measurement["what"],
            measurement["of"],
            f"{measurement['sizes'][0]:,} to {measurement['sizes'][-1]:,}",
            f"{measurement['to the first'][-1]:.1f}",
            f"{measurement['exponent']:.2f}",
            f"{measurement['exponent of the larger']:.2f}",
        ]
        for measurement in results["measured"]
    ]
    return markdown_table(["time of", "against", "sizes", "last to first", "exponent", "of the larger half"], rows)


PASSES = ("forward", "both", "backward", "kept")


def layers_table(layers: list[dict[str, Any]]) -> str:
    """Returns the table of the passes of one layer."""
    head = ["", "input", "dtype", "mask", "chips", "forward", "both in one program", "backward alone", "kept for it"]
    cells = [
        [r["norm"], "×".join(map(str, r["shape"])), r["dtype"], "yes" if r["masked"] else "no", r["topology"]]
        + [f"{r[n]:.2f}" for n in PASSES]
        for r in layers
    ]
    return markdown_table(head, cells)


def steps_table(networks: list[dict[str, Any]]) -> str:
    """Returns the table of whole training steps."""
    flax = {(r["step"], r["topology"]): r for r in networks if r["norm"] == "flax"}
    head = ["step", "chips", "batch norm", "GiB read and written", "to Flax's", "GiB on the chip", "to Flax's", "ms"]
    cells = []
    for r in networks:
        of_flax = flax[r["step"], r["topology"]]
        ratios = [t for unit in ("GiB", "memory") for t in (f"{r[unit]:.2f}", f"{r[unit] / of_flax[unit]:.2f}")]
        cells.append([r["step"], r["topology"], r["norm"], *ratios, f"{r['bound']:.2f}"])
    return markdown_table(head, cells)


def resnet(result: dict[str, Any]) -> str:
    """Returns the table of ResNet-50's step: ratios to Flax's batch norm."""
    compilations, seconds = result["compilations"], result["seconds"]

    def of_flax(name: str, of: Callable[[dict[str, float]], float]) -> list[float]:
        return [of(a) / of(b) for a, b in zip(compilations[name], compilations["flax"], strict=True)]

    quantities: dict[str, Callable[[dict[str, float]], float]] = {
        "tracing and lowering": lambda c: c["trace"] + c["lower"],
        "with compiling": lambda c: c["trace"] + c["lower"] + c["compile"],
        "temporary memory": lambda c: c["temporary"],
        "bytes accessed": lambda c: c["accessed"],
    }
    rows = []
    for name in compilations:
        cells = [f"{float(np.median(of_flax(name, of))):.2f}" for of in quantities.values()]
        if seconds:
            cells.append(spread([a / b for a, b in zip(seconds[name], seconds["flax"], strict=True)]))
        rows.append([name, *cells])
    head = ["to Flax's batch norm", *quantities, *(["a step's time"] if seconds else [])]
    return markdown_table(head, rows)
