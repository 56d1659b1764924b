"""Makes docs/performance.md of the JSON that the benchmarks saved in docs/performance.

python benchmarks/bench_operation.py --dtypes float32 --json docs/performance/operation.json
python benchmarks/bench_operation.py --dtypes float32 --keep-memory --json docs/performance/operation_kept.json
python benchmarks/count_tpu.py --json docs/performance/tpu.json
python docs/make_performance.py
"""

import json
import statistics
from pathlib import Path
from typing import Any

from bnjax.studies.results import markdown_table

HERE = Path(__file__).parent
BOUND = 1.2e-4  # 1000 deviations times the spacing of float32: what rounding of the input itself costs
PEERS = (
    "flax linen",
    "flax linen, two-pass",
    "flax nnx",
    "haiku",
    "equinox",
    "keras",
    "torch",
    "torch, channels last",
)

TEXT = """# Performance

Every number here was measured by the command that stands above it, all contestants in turns in one process. Times are
given as ratios. What is "not met" or "not measured" is said at the end.

## The operation on CPU

`python benchmarks/bench_operation.py --dtypes float32 [--keep-memory]`: bnjax's time to a peer's (median of the rounds,
below 1 where bnjax is faster), in training, on 2 cores of an x86-64 CPU with
{versions}.
Each has the input in the layout it asks for. The last column is bnjax's time to the limit: what the same arrays take to
be summed and copied as often as batch norm must read and write them.

A ratio in parentheses is to a peer that computes something else: where the mean is 1000 deviations from zero, its
output or gradient is off by more than {bound:.1e} of the largest value, the share that rounding the input to float32
costs. bnjax's own largest error there is {ours:.0e}.

{operation}

### What page faults cost

XLA's CPU backend allocates each result anew; glibc gives memory of that size back to the system when it is freed, and
the system clears it page by page when it is next touched. `bnjax.host.keep_freed_memory()` before the first
computation, or `BNJAX_KEEP_MEMORY=1` for the command line, keeps it. bnjax's time with kept memory to its time without,
over the shapes and directions above (two runs, one after the other, so not interleaved): {faults}.

{tpu}

## Goals

{goals}

## What was tried

- A derivative of the normalisation by JAX alone takes three sums over the input in the backward pass, and XLA's CPU
  backend writes out two arrays of the input's size on the way. The hand-made rule takes two sums, and an opaque copy of
  the mean keeps XLA from writing out the difference that the output shares. `tests/test_compiled.py` counts what is
  written.
- Barriers against sharing within one program (`jax.checkpoint`'s default) made TPU's compiler read and write more, in
  ResNet-50's step and for one layer in bfloat16. They are off: what is kept between a forward and a backward pass that
  are compiled apart is the same without.
- On CPU, XLA reads the input once for each of the two sums of the moments. One variadic reduction of both is several
  times slower; sums in blocks of rows, a scan over blocks that stay in the cache, and matrix products with ones each
  win at some shapes and lose at others.
- A shift known before the input is computed (the running mean in place of a sample's) would let TPU's compiler take the
  sums while it convolves, and saves a little; the branch that must repair a bad shift costs more than that.
- In bfloat16 XLA's CPU backend first writes the input out in float32 before it sums, for Flax's layer too.
"""


def load(name: str) -> Any:
    """A benchmark's numbers; None where they have not been saved."""
    path = HERE / "performance" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def ratios(one: dict[str, Any], peer: str) -> list[float]:
    """bnjax's time to a peer's, round by round."""
    seconds = one["seconds"]
    return [a / b for a, b in zip(seconds["bnjax"], seconds[peer], strict=True)]


def accurate(one: dict[str, Any], peer: str) -> bool:
    """Whether a peer's errors stay below the bound for a large mean as well."""
    return max(one["hard errors"][peer]) <= BOUND


def operation(found: dict[str, Any], title: str) -> str:
    """A table of both directions."""
    parts = []
    for backward in (False, True):
        rows = []
        for one in found["measured"]:
            if one["backward"] == backward:
                limit = statistics.median(one["seconds"]["bnjax"]) / one["limit"]
                cells = [cell(one, peer) if peer in one["seconds"] else "" for peer in PEERS]
                rows.append(["×".join(map(str, one["shape"])), *cells, f"{limit:.2f}"])
        what = "Forward + backward" if backward else "Forward"
        parts += [f"{what}, {title}:", markdown_table(["shape", *PEERS, "to the limit"], rows)]
    return "\n\n".join(parts)


def cell(one: dict[str, Any], peer: str) -> str:
    """A ratio, in parentheses where the peer is not accurate."""
    text = f"{statistics.median(ratios(one, peer)):.2f}"
    return text if accurate(one, peer) else f"({text})"


def tpu(found: Any) -> str:
    """Tables of what TPU's compiler makes."""
    if found is None:
        return "## TPU\n\nNot measured."
    text = f"""## TPU, by its compiler

`python benchmarks/count_tpu.py`: passes over an input of {"×".join(map(str, found["shape"]))}, read from
the program for one chip ({found["topology"]}). Under a mask bnjax's forward pass holds a branch that reads
the input once more, where the mask hides most of the sample of the provisional mean; it is counted.
"""
    numbers = ("forward", "both", "backward", "kept")
    rows = [
        [r["norm"], r["dtype"], "yes" if r["masked"] else "no", *(f"{r[key]:.2f}" for key in numbers)]
        for r in found["layers"]
    ]
    head = ["", "dtype", "mask", "forward", "both in one program", "backward alone", "kept for it"]
    parts = [text.rstrip(), markdown_table(head, rows)]
    if found["steps"]:
        flax = {r["step"]: r for r in found["steps"] if r["norm"] == "flax"}
        rows = [
            [r["step"], r["norm"]]
            + [t for unit in ("GiB", "memory") for t in (f"{r[unit]:.2f}", f"{r[unit] / flax[r['step']][unit]:.2f}")]
            for r in found["steps"]
        ]
        head = ["step", "batch norm", "GiB read and written", "to Flax's", "GiB on the chip", "to Flax's"]
        parts += [
            "Whole training steps in bfloat16 (ResNet-50, 128 images) and float32 (the CIFAR network):",
            markdown_table(head, rows),
            "The policy is `bnjax.save_batch_norm_inputs`, with `jax.checkpoint` or Flax's `remat`.",
        ]
    return "\n\n".join(parts)


def worst(found: dict[str, Any], backward: bool) -> tuple[float, float, str, str]:
    """The ratio to a peer that is accurate with the largest lower quartile, that, the peer and the shape."""
    return max(
        (
            statistics.quantiles(ratios(one, peer), n=4)[0],
            statistics.median(ratios(one, peer)),
            peer,
            "×".join(map(str, one["shape"])),
        )
        for one in found["measured"]
        for peer in PEERS
        if one["backward"] == backward and peer in one["seconds"] and accurate(one, peer)
    )


def goals(kept: dict[str, Any], default: dict[str, Any], on_tpu: Any) -> list[tuple[str, str, str]]:
    """Goal, verdict, and what was found."""
    found = []
    for title, numbers in (("memory kept", kept), ("memory not kept", default)):
        for backward in (True, False):
            low, value, peer, shape = worst(numbers, backward)
            what = "forward + backward" if backward else "forward"
            text = f"hardest accurate peer {peer} at {shape}: ratio {value:.2f}, lower quartile {low:.2f}"
            goal = f"fastest of the accurate at every shape on CPU, float32, {what}, {title}"
            found.append((goal, "yes" if low <= 1 else "no", text))
    if on_tpu is not None:
        plain = [r for r in on_tpu["layers"] if r["norm"] == "bnjax"]
        text = ", ".join(f"{r['forward']:.0f} + {r['backward']:.0f}" for r in plain)
        met = all(r["forward"] <= 3.01 and r["backward"] <= 5.01 for r in plain)
        text += " (float32, under a mask, bfloat16, under a mask)"
        found.append(("3 + 5 passes on TPU, mask included", "yes" if met else "but for the branch", text))
        kept_only = max(r["kept"] for r in plain)
        verdict = "yes" if kept_only < 1.01 else "no"
        found.append(("nothing but x kept for the backward pass", verdict, f"{kept_only:.2f} times x's bytes"))
        for name in dict.fromkeys(r["step"] for r in on_tpu["steps"]):
            by_norm = {r["norm"]: r for r in on_tpu["steps"] if r["step"] == name}
            for unit, what in (("GiB", "read and written"), ("memory", "on the chip")):
                shares = {n: by_norm[n][unit] / by_norm["flax"][unit] for n in by_norm if n.startswith("bnjax")}
                text = ", ".join(f"{n}: {share:.2f}" for n, share in shares.items())
                verdict = "yes" if min(shares.values()) <= 0.85 else "no"
                found.append((f"{name} on TPU: 15 % less {what} than with Flax's layer", verdict, text))
    if on_tpu is None or not on_tpu["steps"]:
        found.append(("15 % less than with Flax's layer in whole steps on TPU", "not measured", "here, yet"))
    found += [
        (
            "on a GPU",
            "not measured",
            "none could be had; `bench_operation.py` times PyTorch and JAX on it where there is one",
        ),
        ("bfloat16 on CPU, training, studies, analysis, growth", "not measured", "here, yet"),
    ]
    return found


def main() -> None:
    """Writes the page."""
    default, kept, on_tpu = load("operation"), load("operation_kept"), load("tpu")
    versions = ", ".join(f"{name} {version}" for name, version in kept["device"]["versions"].items())
    pairs = zip(kept["measured"], default["measured"], strict=True)
    faults = [statistics.median(a["seconds"]["bnjax"]) / statistics.median(b["seconds"]["bnjax"]) for a, b in pairs]
    errors = [e for found in (kept, default) for one in found["measured"] for e in one["hard errors"]["bnjax"]]
    page = TEXT.format(
        versions=versions,
        bound=BOUND,
        ours=max(errors),
        operation=operation(kept, "memory kept") + "\n\n" + operation(default, "memory not kept"),
        faults=f"{min(faults):.2f} to {max(faults):.2f}, median {statistics.median(faults):.2f}",
        tpu=tpu(on_tpu),
        goals=markdown_table(["goal", "met", ""], goals(kept, default, on_tpu)),
    )
    (HERE / "performance.md").write_text(page)


if __name__ == "__main__":
    main()
