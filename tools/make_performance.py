"""Makes docs/performance.md from the JSON that the benchmarks saved in docs/performance.

python benchmarks/bench_operation.py --dtypes float32 --json docs/performance/operation.json
python benchmarks/bench_operation.py --dtypes float32 --keep-memory --json docs/performance/operation_kept.json
python benchmarks/bench_operation.py --dtypes bfloat16 --keep-memory --json docs/performance/operation_bfloat16.json
python benchmarks/count_tpu.py --json docs/performance/tpu.json
python benchmarks/count_memory.py --json docs/performance/memory.json
python benchmarks/bench_training.py --keep-memory --json docs/performance/training.json
python benchmarks/bench_resnet.py --batch 8 --side 64 --dtype float32 --json docs/performance/resnet.json
python benchmarks/compare_folding.py --json docs/performance/folding.json
python benchmarks/bench_studies.py --studies circles --repeats 1 --json docs/performance/studies_circles.json
python benchmarks/bench_studies.py --studies mnist --repeats 1 --json docs/performance/studies_mnist.json
python benchmarks/bench_studies.py --studies blobs --repeats 1 --json docs/performance/studies_blobs.json
python benchmarks/bench_convolution.py --json docs/performance/convolution.json
python benchmarks/bench_startup.py --json docs/performance/startup.json
python benchmarks/bench_growth.py --json docs/performance/growth.json
python tools/make_performance.py
"""

import json
import statistics
import sys
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bnjax.studies.evidence.results import markdown_table

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import tables
from common import KNOWN_MEAN, PEERS, spread
from tables import BOUND, accurate, ratios

DOCS = Path(__file__).parents[1] / "docs"
TEXT = """# Performance

![What bnjax takes of what Flax's batch norm takes](figures/performance.png)

*Times on 2 cores of an x86-64 CPU; traffic and memory by TPU's compiler. A mark is the median over shapes or rounds, a
line goes from the least to the most.*

{opening}

Every number here was measured by the command that stands above it, all contestants in turns, in one process or in
alternating processes. Times are given as ratios. Which goals were met, what was tried where one was not, and what could
not be measured is said [at the end](#goals).

## The operation on CPU

`python benchmarks/bench_operation.py --dtypes float32 [--keep-memory]`: bnjax's time to a peer's (median of the rounds,
below 1 where bnjax is faster), in training, on 2 cores of an x86-64 CPU with
{versions}.
Each has the input in the layout it asks for. The last column is bnjax's time to the limit: what the same arrays take to
be summed and copied as often as batch norm must read and write them. "A known mean" is the forward pass with bnjax's
two sums about a provisional mean that is handed to it: what such sums take at least, as XLA compiles them.

A ratio in parentheses is to a peer that computes something else: where the mean is 1000 deviations from zero, its
output or gradient is off by more than {bound:.1e} of the largest value, the share that rounding the input to float32
costs. bnjax's own largest error there is {ours:.0e}.

{operation}

### bfloat16

{bfloat16_errors}

{bfloat16}

### What page faults cost

XLA's CPU backend allocates each result anew; glibc gives memory of that size back to the system when it is freed, and
the system clears it page by page when it is next touched. `bnjax.training.host.keep_freed_memory()` before the first
computation, or `BNJAX_KEEP_MEMORY=1` for the command line, keeps it. bnjax's time with kept memory to its time without,
over the shapes and directions above (two runs, one after the other, so not interleaved): {faults}.

{tpu}

## Memory

`python benchmarks/count_memory.py`: the distinct arrays that the pullback of a batch norm with its ReLU holds, in bytes
of the input, {memory_shape}. Under the policy a network keeps one activation for each batch norm.

{memory}

XLA's CPU backend drops the barriers that keep what is computed anew out of the forward pass: on CPU neither
`jax.checkpoint` nor the policy lowers the peak (last column: what each further block of a matrix product, batch norm
and ReLU adds to the memory of a gradient). On TPU they do, as the steps above show.

## Training

`python benchmarks/bench_training.py --keep-memory`: one training step in float32, bnjax's time to that of the same
network otherwise (median, with quartiles, of {rounds} rounds). The passes are what summing and copying arrays of the
batch norms' inputs takes, as often as they must be read and written.

{training}

`python benchmarks/bench_resnet.py --batch {resnet_options[batch]} --side {resnet_options[side]} --dtype
{resnet_options[dtype]}`: ResNet-50 with each batch norm, to the same with Flax's (medians; the time with quartiles):

{resnet}

## Studies

`python benchmarks/bench_studies.py`: how many times less time bnjax takes for one training than a program in Keras
{keras} that trains the same networks. In its command bnjax trains
{trainings}.
Cold is the whole command, with imports, compilation, figures and files; with a cache, the same with the compiled
programs of an earlier one (`JAX_COMPILATION_CACHE_DIR=DIR JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0`), for circles;
warm is a second training of Keras's networks in one process. One turn each, so without a spread.

{studies}

## Convolutions

`python benchmarks/bench_convolution.py`: a training step of the studies' convolutional networks on CPU by other ways to
convolve, as a multiple of the time by the models' own (median, with extremes, of {convolution_rounds} rounds).
`bnjax.models.layers.conv2d` computes matrix products of windows, and from 16 channels on those of Winograd's tiles; on
accelerators it is XLA's convolution, which on CPU loses its threads inside `lax.scan`.

{convolution}

## Analysis

What measurements cost beside PyTorch is on [a page of its own](measurements.md); how they grow, below.

## Start-up

`python benchmarks/bench_startup.py`: `import bnjax` adds {added:+.1%} to `import jax` (noise);
`bnjax --help` takes {help:.2f} of the time of `import jax`, which it does without.

## Growth

`python benchmarks/bench_growth.py`: the exponent of a power of the size that fits the times, over all sizes and over
the larger half, where what a call costs in any case counts less. 1 is linear.

{growth}

- Examples, channels, layers and probes cost in proportion, once there are enough that a call's own cost is small:
  each is read, computed or repeated once.
- Compilation grows more slowly than the layers, since much of it is the same for any network.
- One program serves all seeds, so that a seed costs less the more there are, until their arrays fill the processor.
- An eigenpair more makes Lanczos's method take more products to its tolerance (here 20 for one, 123 for 16 and 218 for
  32), and each is orthogonalized against up to 2 k + 20 vectors: that part is quadratic, and shows beside this small
  perceptron's cheap products, the more as its vectors leave the cache.
- Measurements cost in proportion to the parameters, of which they read a few whole vectors. Of a hundred million
  parameters the time is that of the memory.
- Devices are simulated here and share two cores and one batch. What grows is what each does whatever its share: its
  calls, its part in the sums, its own update of the parameters, and in measurements the norms of whole gradients. How
  much they communicate is on [the page about devices](scaling.md).

## What guards this

`tests/test_compiled.py` counts, in compiled programs, the arrays that are written, the sums over devices, traces,
transfers to the host and what is kept for the backward pass; with the extra `tpu`, `pytest -m tpu_compiler` compiles
for TPU and checks passes, collectives, and the traffic and memory of whole steps. Neither is a timer. Both fail when
a change costs a pass.

## Goals

{goals}

## What was tried

- A derivative of the normalization by JAX alone takes three sums over the input in the backward pass, and XLA's CPU
  backend writes out two arrays of the input's size on the way. The hand-made rule takes two sums, and an opaque copy of
  the mean keeps XLA from writing out the difference that the output shares. `tests/test_compiled.py` counts what is
  written.
- Barriers against sharing within one program (`jax.checkpoint`'s default) made TPU's compiler read and write more, in
  ResNet-50's step and for one layer in bfloat16. They are off: what is kept between a forward and a backward pass that
  are compiled apart is the same without.
- On CPU, XLA reads the input once for each of the two sums of the moments. One variadic reduction of both is several
  times slower; sums in blocks of rows, a scan over blocks that stay in the cache, and matrix products with ones each
  win at some shapes and lose at others.
- On CPU Keras's forward pass, the fastest of the accurate ones, is a plain sum, then the squares about the mean: two
  reads as well. XLA sums an array faster than its distance from a vector, and two sums about a mean that is known
  beforehand (a column of the table) are no faster than Keras's at most shapes: the sample comes on top. But a plain sum
  rounds a large mean several times: at a mean of 1,000 deviations Keras's output is off by 2 to 3·10⁻⁵ of the largest,
  bnjax's by 6·10⁻⁶ (the benchmark's errors), which only a third read could mend. The more exact mean was kept.
- TPU's compiler takes plain sums of an array while a convolution makes it, but none behind a provisional mean of the
  array itself. In bfloat16 float32 adds the numbers and the halves of their squares exactly, so that no provisional
  mean is needed: ResNet-50's step went from 1.04 of the traffic with Flax's layer, whose sums lose the variance of a
  large mean, to 1.00. A shift known before (the running mean) did the same, but a bad one had to be repaired in a
  branch, which cost more than it saved. Blocks of 2^12 elements in place of 2^14, more exact still, read the largest
  images once more. In float32 there are no such sums; and on CPU they take 1.9 (64×56×56×64) to 2.6 times (65536×256)
  as long as those about a sample.
- Folding a batch norm into the convolution before it: the Gram matrix of the input takes a shift near the mean. One
  from a sample made TPU's compiler write the input once more; one from the input's own exact sums did not. JAX's
  derivative of aᵀ a takes two products of the input's size, the hand-made rule one. In bfloat16 the difference to a
  shift is rounded, which cost the variance of rectified inputs up to 2·10⁻³; a rounded shift for large means, and none
  for small ones, makes every difference exact, and costs 10⁻⁶ to 3·10⁻⁵.
- The CIFAR network's memory on TPU, 1.34 of that with Flax's layer: what is alive at any time takes 52 MB of HBM in
  place of 49, and the compiler's own count of the peak is the same for both. The rest are holes: the compiler lays out
  1,071 operations in place of 881 around the same few large arrays. Neither fewer operations in the sums nor another
  sample changed that.
- Under a mask the elements of the provisional mean are found by the mask's cumulative sum, so that they are none of the
  hidden ones. A branch that repaired the mean where most were hidden read the input once more, for all that TPU's
  compiler knew.
- Squares are scaled before they are summed, by the root of the count, so that the variance is right wherever float32
  can hold it. This is arithmetic for each feature: it reads and writes nothing more, but cifar's step by the policy
  needs 1.3 % more on the chip, in code and in temporary arrays.
- An image's width may be split over devices, so its parts have moments of their own. Splitting it by a reshape let
  TPU's compiler copy the input twice where a part's rows are no whole tiles, as with 56 columns on four chips: 5 passes
  forward. There the moments of each column are taken, and merged: 3.
- XLA does not say how it splits an array. Moments of every part of batch, height and width, merged axis by axis, take
  no more collectives than Flax's layer however it is split. Where the batch alone is split over 8 chips, the moments of
  64 parts on each chip cost at most 0.13 of a pass over an input of 112 × 112 pixels and 64 features, and nothing of
  larger ones; on 8 simulated devices, which share two cores, the forward pass takes up to 1.4 times what it took with
  the width whole.
- In bfloat16 XLA's CPU backend first writes the input out in float32 before it sums, for Flax's layer too. PyTorch's
  kernel reads bfloat16.
- Within a network under a policy JAX handed on each batch norm's input three times, once for each nested checkpoint: a
  second name for it, which no policy keeps, leaves one. TPU's compiler had merged them before: its counts stayed.
- What the policy saves of ResNet-50's memory it pays for in traffic, since XLA computes anew behind a barrier what it
  would else have fused.
- Studies: the random order of the examples took a quarter of an epoch of circles, since XLA's CPU backend sorts pairs
  several times slower than numbers; one sort of 64-bit numbers gives the same order. What does not fill a batch is a
  smaller batch, where all batches carried a mask before. A variant trained again compiles nothing. Two trainings run at
  a time, one on each core; what remains of a cold command is tracing and compilation.
- Circles, warm: with XLA's full effort (`XLA_FLAGS="--xla_backend_optimization_level=3
  --xla_llvm_disable_expensive_passes=false --xla_cpu_use_fusion_emitters=true"`) a training takes 0.7 to 0.9 of the
  time, but compiling costs the command more than that saves: 1.4 times the time of the whole. The networks are so small
  that a second core makes one training no faster; a seventh of it is the counting of histograms, and the rest many
  small operations on the arrays of all seeds.
- Half of MNIST's step is matrix products, and a quarter Adam's update of all seeds' parameters: no more was found to
  save there. The time of blobs is in its deep networks' matrix products, which Keras has too.
- Training on CPU: the same network without batch norm is not faster than PyTorch's either. Its convolutions, as matrix
  products and the transforms around them, are what is behind.
"""


def load(name: str) -> Any:
    """Loads a benchmark's numbers."""
    return json.loads((DOCS / "performance" / f"{name}.json").read_text())


def bars(results: dict[str, Any]) -> dict[str, list[float]]:
    """Returns what bnjax takes of what Flax's batch norm takes, one or several numbers for each quantity."""

    def of_operation(run: dict[str, Any], backward: bool) -> list[float]:
        of_direction = [m for m in run["measured"] if m["backward"] == backward]
        return [statistics.median(ratios(m, "flax linen")) for m in of_direction]

    on_tpu, compilations = shares_of_flax(results["tpu"]), results["resnet"]["compilations"]
    folded, plain = (on_tpu["resnet50", "v5e:1x1", n] for n in ("bnjax, folded", "bnjax"))
    (kept, of_flax) = (
        next(r["kept"] for r in results["tpu"]["layers"] if r["norm"] == n and r["dtype"] == "bfloat16" and r["masked"])
        for n in ("bnjax", "flax")
    )

    def compiling(name: str) -> list[float]:
        sums = ([sum(c[k] for k in ("trace", "lower", "compile")) for c in compilations[n]] for n in (name, "flax"))
        return [a / b for a, b in zip(*sums, strict=True)]

    steps = results["resnet"]["seconds"]
    return {
        "TPU, one layer, bfloat16, a mask: kept for the backward pass": [kept / of_flax],
        "TPU, ResNet-50 folded: read and written": [folded["GiB"]],
        "TPU, ResNet-50 folded: memory": [folded["memory"]],
        "TPU, ResNet-50 folded: bound of the time": [folded["bound"]],
        "TPU, ResNet-50, the plain pair: read and written": [plain["GiB"]],
        "CPU, one layer, float32: forward + backward": of_operation(results["operation_kept"], True),
        "CPU, one layer, float32: forward": of_operation(results["operation_kept"], False),
        "CPU, one layer, bfloat16: forward + backward": of_operation(results["operation_bfloat16"], True),
        "CPU, ResNet-50 folded: a step": [a / b for a, b in zip(steps["bnjax, folded"], steps["flax"], strict=True)],
        "CPU, ResNet-50: tracing and compiling": compiling("bnjax"),
    }


def draw(found: dict[str, list[float]]) -> None:
    """Draws the page's figure."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axis = figure.subplots()
    for i, values in enumerate(found.values()):
        middle = statistics.median(values)
        axis.plot([min(values), max(values)], [i, i], color="C0", alpha=0.4, linewidth=5, solid_capstyle="round")
        axis.plot(middle, i, "o", color="C0")
        label = axis.annotate(f"{middle:.2f}", (max(values), i), xytext=(8, 0), textcoords="offset points", va="center")
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
    axis.axvline(1, color="black", linewidth=1)
    axis.set_yticks(range(len(found)), list(found))
    axis.invert_yaxis()
    axis.set_xlim(0, max(1.2, *(max(v) for v in found.values())) + 0.15)
    figure.supxlabel("as a share of that with Flax's batch norm (the line); less is better", fontsize="medium")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "figures" / "performance.png", dpi=120)


def of_accuracies(folding: dict[str, Any]) -> str:
    """Returns what the accuracies of networks that are trained folded and as pairs say."""
    named = {"ResNet-18": folding["resnet18"]["difference"], "bottlenecks": folding["bottlenecks"]["difference"]}
    texts = "; ".join(f"{n}: {100 * d['mean']:+.1f} ± {100 * d['half']:.1f}" for n, d in named.items())
    shows = "show no change" if all(abs(d["mean"]) <= d["half"] for d in named.values()) else "differ"
    return (
        f"Accuracies of {folding['seeds']} seeds {shows} by folding (percent of CIFAR-10, folded less pair: {texts})."
    )


def opening(found: dict[str, list[float]], results: dict[str, Any]) -> str:
    """Returns what a user reads first."""
    of = {name: statistics.median(values) for name, values in found.items()}
    passes = {(round(r["forward"]), round(r["backward"])) for r in results["tpu"]["layers"] if r["norm"] == "bnjax"}
    (forward, backward) = max(passes)
    bound = {r["norm"]: r["bound"] for r in results["tpu"]["steps"] if r["topology"] == "v5e:1x1"}
    fastest = worst(results["operation_kept"], True)[0] <= 1
    _, hard, peer, shape = worst(results["operation_kept"], False)
    lines = [
        f"On TPU batch norm takes {forward} passes over its input forward and {backward} backward, in float32 and "
        "bfloat16, under a mask or not, on one chip or synchronized over several: no exact one takes fewer by itself.",
        "Nothing but the input is kept for the backward pass. Flax's layer keeps 2 to 9 times as much.",
        "Folded into the convolution before it, the normalized product is never written: ResNet-50's step takes "
        f"{of['TPU, ResNet-50 folded: read and written']:.2f} of the traffic and "
        f"{of['TPU, ResNet-50 folded: memory']:.2f} of the memory with Flax's, and cannot take less than "
        f"{bound['bnjax, folded']:.1f} ms in place of {bound['flax']:.1f} ({bound['none']:.1f} without batch norm).",
        *([of_accuracies(results["folding"])] if "folding" in results else []),
        "On CPU a layer in float32, forward and backward, takes "
        f"{of['CPU, one layer, float32: forward + backward']:.2f} of the time of Flax's (median over shapes), and is "
        f"{'' if fastest else 'not '}the fastest of the accurate peers at every shape.",
        f"Forward alone it takes up to {hard:.2f} times the time of an accurate peer ({peer}, {shape}).",
        "In bfloat16 on CPU it takes "
        f"{of['CPU, one layer, bfloat16: forward + backward']:.2f} of Flax's time; PyTorch's kernels are faster still.",
        f"ResNet-50's step, folded, takes {of['CPU, ResNet-50 folded: a step']:.2f} of the time with Flax's on CPU; "
        f"tracing and compiling the plain one {of['CPU, ResNet-50: tracing and compiling']:.2f}.",
        "The studies train many seeds in one program: a training of circles takes a small part of Keras's time, below.",
        "Nothing here was measured on a GPU; `tools/device_run.sh` is ready to.",
    ]
    return "\n".join(textwrap.fill(line, 118, initial_indent="- ", subsequent_indent="  ") for line in lines)


def tpu(results: Any) -> str:
    """Returns the text and tables of the programs that TPU's compiler makes."""
    text = """## TPU, by its compiler

`python benchmarks/count_tpu.py`: passes over the input, read from the program for one chip, and for four that share
the batch and its statistics. Each of the four has a quarter of the same input, which its fast memory holds from one
pass to the next, or as much as the one chip has. The whole numbers of bnjax leave no room for a copy of the input or a
change of its layout.
"""
    parts = [
        text.rstrip(),
        tables.layers_table(results["layers"]),
        "Whole training steps, with as many examples on each chip: ResNet-50 in bfloat16, 128 images of 224 × 224,\n"
        "and the CIFAR network in float32, 80 images. The last column is the least time that the counts allow:",
        tables.steps_table(results["steps"]),
        "Folded is `bnjax.linen.ConvBatchNorm`, as in `bnjax.models.ResNet` by default. The policy is\n"
        "`bnjax.save_batch_norm_inputs`, with `jax.checkpoint` or Flax's `remat`.",
    ]
    return "\n\n".join(parts)


def worst(results: dict[str, Any], backward: bool) -> tuple[float, float, str, str]:
    """Finds the accurate peer and the shape with the largest lower quartile; returns it, the median, peer and shape."""
    return max(
        (
            statistics.quantiles(ratios(measurement, peer), n=4)[0],
            statistics.median(ratios(measurement, peer)),
            peer,
            "×".join(map(str, measurement["shape"])),
        )
        for measurement in results["measured"]
        for peer in PEERS
        if measurement["backward"] == backward and peer in measurement["seconds"] and accurate(measurement, peer)
    )


def known_mean(results: dict[str, Any], peer: str, shape: str) -> str:
    """Returns what two sums about a known mean take there of a peer's time."""
    seconds = next(
        measurement["seconds"]
        for measurement in results["measured"]
        if not measurement["backward"] and "×".join(map(str, measurement["shape"])) == shape
    )
    if KNOWN_MEAN not in seconds:
        return ""
    ratio = statistics.median(a / b for a, b in zip(seconds[KNOWN_MEAN], seconds[peer], strict=True))
    return f"; two sums about a known mean: {ratio:.2f}"


def goals(
    kept: dict[str, Any], default: dict[str, Any], bfloat16: dict[str, Any], on_tpu: Any
) -> list[tuple[str, str, str]]:
    """Returns the goals of the operation and on TPU, each with its verdict and the numbers behind it."""
    rows = []
    for title, numbers in (
        ("float32, memory kept", kept),
        ("float32, memory not kept", default),
        ("bfloat16, memory kept", bfloat16),
    ):
        for backward in (True, False):
            low, value, peer, shape = worst(numbers, backward)
            subject = "forward + backward" if backward else "forward"
            text = f"hardest accurate peer {peer} at {shape}: ratio {value:.2f}, lower quartile {low:.2f}"
            if not backward and low > 1:
                text += known_mean(numbers, peer, shape)
            goal = f"fastest of the accurate at every shape on CPU, {subject}, {title}"
            rows.append((goal, verdict(low <= 1), text))
    plain = [r for r in on_tpu["layers"] if r["norm"] == "bnjax"]
    text = ", ".join(f"{r['forward']:.0f} + {r['backward']:.0f}" for r in plain)
    met = all(r["forward"] <= 3.01 and r["backward"] <= 5.01 for r in plain)
    text += " (in the order of the table)"
    rows.append(("3 + 5 passes on TPU, mask and sync included", "yes" if met else "but for masks", text))
    kept_only = max(r["kept"] for r in plain)
    text = f"{kept_only:.2f} times x's bytes"
    rows.append(("nothing but x kept for the backward pass", verdict(kept_only < 1.01), text))
    shares = shares_of_flax(on_tpu)
    plain_step = shares["resnet50", "v5e:1x1", "bnjax"]["GiB"]
    text = f"{plain_step:.4f}"
    rows.append(
        ("ResNet-50 on TPU, not folded: no more read and written than with Flax's", verdict(plain_step <= 1), text)
    )
    for unit, subject, most in (("GiB", "read and written", 0.85), ("memory", "on the chip", 0.78)):
        folded = {topology: of[unit] for (step, topology, norm), of in shares.items() if norm == "bnjax, folded"}
        text = ", ".join(f"{topology}: {share:.3f}" for topology, share in folded.items())
        goal = f"ResNet-50 on TPU, folded: at most {most} of Flax's {subject}, on 1, 8 and 256 chips"
        rows.append((goal, verdict(max(folded.values()) <= most), text))
    of_cifar = {norm: of["memory"] for (step, _, norm), of in shares.items() if step == "cifar"}
    text = ", ".join(f"{norm}: {share:.2f}" for norm, share in of_cifar.items() if norm.startswith("bnjax"))
    rows.append(
        ("the CIFAR network on TPU: no more on the chip than with Flax's", verdict(of_cifar["bnjax"] <= 1), text)
    )
    return rows


def shares_of_flax(on_tpu: Any) -> dict[tuple[str, str, str], dict[str, float]]:
    """Returns what each whole step takes of what it takes with Flax's batch norm, by step, chips and batch norm."""
    found = {}
    for r in on_tpu["steps"]:
        (flax,) = (
            f for f in on_tpu["steps"] if f["norm"] == "flax" and all(f[k] == r[k] for k in ("step", "topology"))
        )
        found[r["step"], r["topology"], r["norm"]] = {unit: r[unit] / flax[unit] for unit in ("GiB", "memory", "bound")}
    return found


GOALS_OF_STUDIES = (("circles", "warm", 100), ("circles", "cold", 10), ("mnist", "warm", 10), ("mnist", "cold", 10))


def other_goals(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Returns the goals beyond the operation and TPU, each with its verdict and the numbers behind it."""
    by_policy = [r["kept"] for r in results["memory"]["measured"] if "save_batch_norm_inputs" in r["norm"]]
    rows = [
        (
            "only x kept for a batch norm + ReLU by the policy",
            verdict(max(by_policy) < 1.01),
            f"{max(by_policy):.2f} times x's bytes",
        )
    ]
    for measurement in results["training"]["measured"]:
        ratios = measurement["ratios"]
        torch = max((ratios[n] for n in ratios if n.startswith("torch")), key=statistics.median)
        rows += [
            (
                f"{measurement['network']}: no slower than PyTorch on CPU",
                verdict(statistics.median(torch) <= 1),
                spread(torch),
            ),
            (
                f"{measurement['network']}: within 3 % of no batch norm and the passes",
                verdict(statistics.median(ratios["no norm + the passes"]) <= 1.03),
                spread(ratios["no norm + the passes"]),
            ),
        ]
    by_study = {measurement["study"]: measurement for measurement in results["studies"]}
    for study, kind, goal in GOALS_OF_STUDIES:
        medians = {b: statistics.median(of_kind[kind]) for b, of_kind in by_study[study]["ratios"].items()}
        text = ", ".join(f"{value:.1f} (Keras on {backend})" for backend, value in medians.items())
        goal_text = f"{study}: {goal} times faster per training than Keras, {kind}"
        rows.append((goal_text, verdict(min(medians.values()) >= goal), text))
    summary = results["startup"]["summary"]
    for name in ("import bnjax adds under 50 ms", "bnjax --help takes under 0.5 s"):
        rows.append((name, verdict(summary[name]), ""))
    above = [
        measurement for measurement in results["growth"]["measured"] if measurement["exponent of the larger"] > 1.1
    ]
    text = "; ".join(
        f"{measurement['what']} against {measurement['of']}: {measurement['exponent of the larger']:.2f}"
        for measurement in above
    )
    compiling = bars(results)["CPU, ResNet-50: tracing and compiling"]
    rows.append(
        (
            "tracing and compiling ResNet-50 on CPU: at most 1.05 of Flax's",
            verdict(statistics.median(compiling) <= 1.05),
            spread(compiling),
        )
    )
    rows.append(("nothing grows faster than linearly", verdict(not above), text or "all exponents are at most 1.1"))
    text = "none could be had; `bench_operation.py` and `bench_training.py` run on one where there is one"
    return [*rows, ("everything on a GPU", "not measured", text)]


def paragraph(text: str) -> str:
    """Wraps a text as the page's other text is wrapped."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def verdict(is_met: bool) -> str:
    """Returns the word for a goal that is met or not."""
    return "yes" if is_met else "no"


def main() -> None:
    """Writes the page."""
    default, kept = load("operation"), load("operation_kept")
    results = {
        n: load(n)
        for n in (
            "operation_kept",
            "operation_bfloat16",
            "tpu",
            "memory",
            "training",
            "convolution",
            "startup",
            "growth",
        )
        + ("resnet",)
    }
    if (DOCS / "performance" / "folding.json").exists():
        folding = load("folding")
        if all("difference" in folding.get(name, {}) for name in ("resnet18", "bottlenecks")):
            results["folding"] = folding
    runs = sorted((DOCS / "performance").glob("studies_*.json"))
    results["studies"] = [measurement for path in runs for measurement in json.loads(path.read_text())["measured"]]
    bfloat16 = results["operation_bfloat16"]
    versions = ", ".join(f"{name} {version}" for name, version in kept["device"]["versions"].items())
    pairs = zip(kept["measured"], default["measured"], strict=True)
    faults = [statistics.median(a["seconds"]["bnjax"]) / statistics.median(b["seconds"]["bnjax"]) for a, b in pairs]
    errors = [
        e
        for operations in (kept, default)
        for measurement in operations["measured"]
        for e in measurement["hard errors"]["bnjax"]
    ]
    largest = {
        name: max(max(measurement["errors"].get(name, [0])) for measurement in bfloat16["measured"])
        for name in ("bnjax", *PEERS)
    }
    summary = results["startup"]["summary"]
    counts = ", ".join(
        f"{measurement['trainings']} networks ({measurement['study']})" for measurement in results["studies"]
    )
    found = bars(results)
    draw(found)
    page = TEXT.format(
        opening=opening(found, results),
        resnet=tables.resnet(results["resnet"]),
        resnet_options=results["resnet"]["options"],
        versions=versions,
        bound=BOUND,
        ours=max(errors),
        operation=tables.operation(kept, "memory kept") + "\n\n" + tables.operation(default, "memory not kept"),
        bfloat16=tables.operation(bfloat16, "bfloat16, memory kept"),
        bfloat16_errors=paragraph(
            "`--dtypes bfloat16 --keep-memory`. The largest errors of output and gradient against float64, over all "
            f"shapes, are {', '.join(f'{error:.0e} ({name})' for name, error in largest.items())}. In parentheses are "
            "ratios to peers whose error is more than twice bnjax's."
        ),
        faults=f"{min(faults):.2f} to {max(faults):.2f}, median {statistics.median(faults):.2f}",
        tpu=tpu(results["tpu"]),
        memory=tables.memory(results["memory"]),
        memory_shape="×".join(map(str, results["memory"]["shape"])),
        rounds=len(results["training"]["measured"][0]["seconds"]["bnjax"]),
        training=tables.training(results["training"]),
        keras=kept["device"]["versions"]["keras"],
        trainings=counts,
        studies=tables.studies(results["studies"]),
        convolution=tables.convolution(results["convolution"]),
        convolution_rounds=len(results["convolution"]["ratios"]["cifar"]["windows"]),
        added=summary["added to import jax, as a share of it"]["import jax, bnjax"],
        help=summary["bnjax --help to import jax"],
        growth=tables.growth(results["growth"]),
        goals=markdown_table(
            ["goal", "met", ""], goals(kept, default, bfloat16, results["tpu"]) + other_goals(results)
        ),
    )
    (DOCS / "performance.md").write_text(page)


if __name__ == "__main__":
    main()
