"""A benchmark of curvature beside the other libraries for it, in one run, in which they take turns.

    pip install -e ".[bench]" && python benchmarks/bench_curvature.py [--questions …] [--json FILE]

curvlinops, hessian-eigenthings and PyHessian are PyTorch's, matfree is JAX's. Networks and batches are those of
`bench_analysis.py`, in PyTorch without running statistics: with them curvlinops raises an error in training mode, and
PyHessian, which measures in evaluation mode, would measure another function. Four questions:

- product: one Hessian product. Ours and matfree's is linearized once, and PyHessian keeps PyTorch's graph; the others
  differentiate anew;
- eigenpairs: the k largest by magnitude, to relative residuals of 1e-3. curvlinops hands its operator to SciPy's
  `eigsh` (ARPACK). hessian-eigenthings and matfree take a number of products, so they are given as many as ours took;
  hessian-eigenthings with `reorthogonalize=True`, since beyond 50 products it leaves that out by default and then
  returns some eigenvalues several times. PyHessian's power iteration has its own tolerance, 1e-3 between iterations;
- trace: the standard deviation over 30 seeds of estimates from 60 products, over the trace, of the perceptron after
  30 steps of gradient descent;
- memory: the most that one product with the Gauss–Newton matrix of a small transformer (50,257 tokens, 1,024 at once)
  takes beyond what was taken before, each in a process of its own.
"""

import argparse
import ctypes
import gc
import inspect
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import curvlinops
import hessian_eigenthings
import jax
import jax.numpy as jnp
import numpy as np
import pyhessian
import torch
from bench_analysis import TOLERANCE, Pair, turns
from common import device, save
from jax.flatten_util import ravel_pytree
from matfree import decomp, eig, stochtrace
from scipy.sparse.linalg import eigsh
from torch.nn.attention import SDPBackend, sdpa_kernel

from bnjax import analysis

PRODUCTS_OF_TRACE, SEEDS, STEPS, RATE = 60, 30, 30, 0.1
HAS_FUSED = "fused" in inspect.signature(hessian_eigenthings.hf_lm_loss_of_output).parameters  # since 1.0.0a6
VOCABULARY, TOKENS, LENGTH, SIZE, HEADS, BLOCKS = 50257, 1024, 128, 64, 4, 2


class Rivals:
    """The Hessian of one network and batch in each library."""

    def __init__(self, pair: Pair):
        self.pair, criterion = pair, torch.nn.CrossEntropyLoss()
        last = pair.images if pair.images.ndim == 2 else pair.images.contiguous(memory_format=torch.channels_last)
        self.data = last, pair.labels
        self.module = pair.module.train()
        for layer in self.module.modules():
            if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
                layer.track_running_stats = False
                layer.running_mean = layer.running_var = layer.num_batches_tracked = None
        parameters = list(self.module.parameters())
        self.curvlinops = curvlinops.HessianLinearOperator(
            self.module, criterion, parameters, [self.data], check_deterministic=False
        )
        self.eigenthings = hessian_eigenthings.HessianOperator(
            self.module, [self.data], hessian_eigenthings.supervised_loss(criterion)
        )
        self.size = sum(p.numel() for p in parameters)
        self.flat, self.unravel = ravel_pytree(pair.params)

    def pyhessian(self) -> Any:
        """Makes PyHessian's object, which takes the gradient of the batch."""
        self.module.zero_grad()
        return pyhessian.hessian(self.module, torch.nn.CrossEntropyLoss(), data=self.data, cuda=False)

    def ours(self, params: Any, *batch: Any) -> analysis.SymmetricOperator:
        """Makes our operator, within a compiled function."""
        return analysis.hessian_operator(self.pair.loss, params, *batch, method="linearized")


def products(rivals: Rivals, repeats: int) -> dict[str, Any]:
    """Compares single Hessian products, of which ten are computed at once."""
    v = np.random.default_rng(0).normal(size=rivals.size).astype(np.float32)
    vector, pair = torch.from_numpy(v), rivals.pair
    first = rivals.unravel(jnp.asarray(v))

    @jax.jit
    def ten(params, vector, *batch):
        operator = rivals.ours(params, *batch)
        return jax.lax.fori_loop(0, 10, lambda _, v: jax.tree.map(lambda a, b: a + 1e-30 * b, v, operator(v)), vector)

    kept = rivals.pyhessian()
    parts = [
        p.reshape(q.shape) for p, q in zip(vector.split([q.numel() for q in kept.params]), kept.params, strict=True)
    ]

    def repeated(product: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(10):
                product()

        return run

    times = turns(
        {
            "ours": lambda: jax.block_until_ready(ten(pair.params, first, *pair.batch)),
            "curvlinops": repeated(lambda: rivals.curvlinops @ vector),
            "hessian-eigenthings": repeated(lambda: rivals.eigenthings.matvec(vector)),
            "PyHessian": repeated(lambda: pyhessian.utils.hessian_vector_product(kept.gradsH, kept.params, parts)),
        },
        repeats,
    )
    return {"seconds": times, "times_of_ours": _ratios(times)}


def eigenpairs(rivals: Rivals, repeats: int, count: int) -> dict[str, Any]:
    """Compares the computation of the largest eigenvalues by magnitude."""
    pair, found = rivals.pair, {}
    start = np.random.default_rng(0).normal(size=rivals.size).astype(np.float32)
    first = rivals.unravel(jnp.asarray(start))

    @jax.jit
    def run_ours(params, first, *batch):
        start = jax.tree.map(lambda v: v[None], first)
        return analysis.eigenpairs(
            rivals.ours(params, *batch),
            count,
            key=jax.random.key(0),
            start=start,
            which="magnitude",
            tolerance=TOLERANCE,
        )

    most = int(run_ours(pair.params, first, *pair.batch).products)

    @jax.jit
    def run_matfree(params, first, *batch):
        operator = rivals.ours(params, *batch)
        values, vectors = eig.eigh_partial(decomp.tridiag_sym(most))(operator, first)
        order = jnp.argsort(-jnp.abs(values))[:count]
        return values[order], jax.tree.map(lambda v: v[order], vectors)

    def ours() -> None:
        found["ours"] = jax.block_until_ready(run_ours(pair.params, first, *pair.batch))

    def matfree() -> None:
        found["matfree"] = jax.block_until_ready(run_matfree(pair.params, first, *pair.batch))

    def of_curvlinops() -> None:
        operator = rivals.curvlinops.to_scipy()
        found["curvlinops"] = eigsh(operator, count, which="LM", tol=TOLERANCE, v0=start)

    def eigenthings() -> None:
        options = {"max_iter": most, "tol": TOLERANCE, "seed": 0, "reorthogonalize": True}
        result = hessian_eigenthings.lanczos(rivals.eigenthings, k=count, **options)
        found["hessian-eigenthings"] = result.eigenvalues.numpy(), result.residuals.numpy()

    def of_pyhessian() -> None:
        found["PyHessian"] = rivals.pyhessian().eigenvalues(maxIter=100, tol=TOLERANCE, top_n=count)

    contestants = {"ours": ours, "matfree": matfree, "curvlinops": of_curvlinops, "hessian-eigenthings": eigenthings}
    if count == 5:
        contestants["PyHessian"] = of_pyhessian
    times = turns(contestants, repeats)
    values = np.sort(np.asarray(found["ours"].values))
    differences = {
        name: float(np.abs(np.sort(np.asarray(found[name][0])) / values - 1).max())
        for name in ("matfree", "curvlinops", "hessian-eigenthings")
    }
    theirs, residuals = found["hessian-eigenthings"]
    return {
        "seconds": times,
        "times_of_ours": _ratios(times),
        "products": most,
        "largest_relative_difference": differences,
        "largest_relative_residual": {
            "ours": float((found["ours"].residuals / jnp.abs(found["ours"].values)).max()),
            "hessian-eigenthings": float(np.abs(residuals / theirs).max()),
        },
    }


def traces(rivals: Rivals, repeats: int) -> dict[str, Any]:
    """Compares the spread of estimates of the trace from as many products."""
    del repeats
    pair, count = rivals.pair, PRODUCTS_OF_TRACE
    operator = rivals.ours(pair.params, *pair.batch)

    def of_method(method: str) -> Callable[[int], float]:
        run = jax.jit(lambda key: analysis.trace(operator, key=key, num_samples=count, method=method).estimate)
        return lambda seed: float(run(jax.random.key(seed)))

    sampler = stochtrace.sampler_normal(rivals.flat, num=count // 2)
    estimator = stochtrace.estimator_leave_one_out(stochtrace.leave_one_out_xtrace(), sampler)
    by_matfree = jax.jit(lambda key: estimator(lambda v: ravel_pytree(operator(rivals.unravel(v)))[0], key).mean())

    def of_matfree(seed: int) -> float:
        return float(by_matfree(jax.random.key(seed)))

    def of_curvlinops(function: Callable[..., Any]) -> Callable[[int], float]:
        def run(seed: int) -> float:
            torch.manual_seed(seed)
            return float(function(rivals.curvlinops, count))

        return run

    def of_eigenthings(seed: int) -> float:
        return hessian_eigenthings.trace(rivals.eigenthings, num_matvecs=count, seed=seed).estimate

    methods = {
        "ours, Hutchinson": of_method("hutchinson"),
        "ours, Hutch++": of_method("hutch++"),
        "ours, XTrace": of_method("xtrace"),
        "curvlinops, Hutchinson": of_curvlinops(curvlinops.hutchinson_trace),
        "curvlinops, Hutch++": of_curvlinops(curvlinops.hutchpp_trace),
        "curvlinops, XTrace": of_curvlinops(curvlinops.xtrace),
        "hessian-eigenthings, Hutch++": of_eigenthings,
        "matfree, XTrace": of_matfree,
    }
    estimates = {name: [run(seed) for seed in range(SEEDS)] for name, run in methods.items()}
    middle = statistics.mean(estimates["ours, XTrace"])
    return {
        "estimates": estimates,
        "relative_deviation": {name: statistics.stdev(v) / middle for name, v in estimates.items()},
        "relative_offset": {name: statistics.mean(v) / middle - 1 for name, v in estimates.items()},
    }


def _ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Returns the median of each contestant's times over that of ours."""
    ours = statistics.median(times["ours"])
    return {name: statistics.median(values) / ours for name, values in times.items() if name != "ours"}


def tokens() -> np.ndarray:
    """Makes the batch of the small transformer, `[sequences, LENGTH]`."""
    return np.random.default_rng(0).integers(0, VOCABULARY, (TOKENS // LENGTH, LENGTH))


def our_transformer_product(chunked: bool) -> Callable[[], Any]:
    """Makes a product with the Gauss–Newton matrix of the transformer in Flax: with its head in chunks, or whole."""
    from flax import linen as nn

    class Transformer(nn.Module):
        @nn.compact
        def __call__(self, tokens: Any) -> Any:
            x = nn.Embed(VOCABULARY, SIZE)(tokens) + nn.Embed(LENGTH, SIZE)(jnp.arange(LENGTH))[None]
            for _ in range(BLOCKS):
                y = nn.LayerNorm()(x)
                x = x + nn.MultiHeadDotProductAttention(HEADS)(y, y, mask=nn.make_causal_mask(tokens))
                x = x + nn.Dense(SIZE)(nn.gelu(nn.Dense(4 * SIZE)(nn.LayerNorm()(x))))
            return nn.LayerNorm()(x)

    model, batch = Transformer(), jnp.asarray(tokens())
    params = {
        "body": model.init(jax.random.key(0), batch)["params"],
        "head": jax.random.normal(jax.random.key(1), (SIZE, VOCABULARY)) / 8,
    }

    def features(params: Any, tokens: Any) -> Any:
        return model.apply({"params": params["body"]}, tokens)

    def head(params: Any, features: Any) -> Any:
        return features @ params["head"]

    def product(params: Any, tokens: Any) -> Any:
        if chunked:
            operator = analysis.fisher_operator(features, params, tokens, head=head)
        else:
            operator = analysis.fisher_operator(lambda p, t: head(p, features(p, t)), params, tokens)
        return operator(params)

    run = jax.jit(product)
    return lambda: jax.block_until_ready(run(params, batch))


def torch_transformer_product(fused: str | None) -> Callable[[], Any]:
    """Makes a product with the Gauss–Newton matrix of the transformer by hessian-eigenthings."""
    nn = torch.nn

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.places = nn.Embedding(VOCABULARY, SIZE), nn.Embedding(LENGTH, SIZE)
            options: dict[str, Any] = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
            layers = [nn.TransformerEncoderLayer(SIZE, HEADS, 4 * SIZE, **options) for _ in range(BLOCKS)]
            self.layers, self.norm = nn.ModuleList(layers), nn.LayerNorm(SIZE)
            self.head = nn.Linear(SIZE, VOCABULARY, bias=False)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.tokens(tokens) + self.places(torch.arange(LENGTH))[None]
            mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
            for layer in self.layers:
                x = layer(x, src_mask=mask, is_causal=True)
            return self.head(self.norm(x))

    torch.manual_seed(0)
    model, batch = Transformer(), torch.from_numpy(tokens())
    operator = hessian_eigenthings.GGNOperator(
        model,
        [{"input_ids": batch, "labels": batch}],
        lambda model, batch: model(batch["input_ids"]),
        hessian_eigenthings.hf_lm_loss_of_output(**({"fused": fused} if fused else {})),
    )
    vector = torch.randn(operator.size)

    def product() -> Any:
        with sdpa_kernel(SDPBackend.MATH):  # others have no derivative along a tangent
            return operator.matvec(vector)

    return product


MEMORY: dict[str, Callable[[], Callable[[], Any]]] = {
    "ours, head in chunks": lambda: our_transformer_product(chunked=True),
    "ours, all logits": lambda: our_transformer_product(chunked=False),
    "hessian-eigenthings": lambda: torch_transformer_product(None),
    **({"hessian-eigenthings, not fused": lambda: torch_transformer_product("eager")} if HAS_FUSED else {}),
}


def peak_of(name: str) -> int:
    """Returns by how many bytes a second product raises this process's memory at its height (Linux with glibc)."""

    def status(field: str) -> int:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith(f"{field}:"))

    product = MEMORY[name]()
    product()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # gives back what was freed
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the height
    kept = product()
    height = status("VmHWM")
    del kept
    return height - before


def memory() -> dict[str, Any]:
    """Measures the memory of each product in a process of its own."""
    peaks = {}
    for name in MEMORY:
        done = subprocess.run(
            [sys.executable, __file__, "--peak-of", name], capture_output=True, text=True, check=False
        )
        peaks[name] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else done.stderr.strip()[-300:]
    array = 4 * TOKENS * VOCABULARY
    arrays = {name: peak / array for name, peak in peaks.items() if isinstance(peak, int)}
    return {"bytes": peaks, "arrays_of_tokens_times_vocabulary": arrays}


def main() -> None:
    """Runs the comparisons, prints ratios, and saves all times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="perceptron,vgg", help="networks (default perceptron,vgg)")
    parser.add_argument(
        "--questions", default="product,eigenpairs,trace,memory", help="questions (default %(default)s)"
    )
    parser.add_argument("--width", type=int, default=8, help="width of VGG (default %(default)s)")
    parser.add_argument("--counts", default="5,10,20", help="numbers of eigenpairs (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="alternating runs (default 5)")
    parser.add_argument("--json", help="where to save all times")
    parser.add_argument("--peak-of", choices=MEMORY, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if options.peak_of:
        print(json.dumps(peak_of(options.peak_of)))
        return
    results: dict[str, Any] = {"device": device(), "width": options.width}
    asked = options.questions.split(",")
    for network in options.networks.split(","):
        questions: dict[str, Callable[[Rivals, int], dict[str, Any]]] = {}
        if "product" in asked:
            questions["product"] = products
        for count in map(int, options.counts.split(",") if "eigenpairs" in asked else ()):
            questions[f"{count} eigenpairs"] = lambda rivals, repeats, count=count: eigenpairs(rivals, repeats, count)
        if "trace" in asked and network == "perceptron":
            questions["trace"] = traces
        for question, answer in questions.items():
            pair = Pair(network, options.width)
            if question == "trace":
                pair.train(STEPS, RATE)
            results[f"{network}, {question}"] = result = answer(Rivals(pair), options.repeats)
            report(f"{network}, {question}", result)
    if "memory" in asked:
        results["memory"] = memory()
        report("memory", results["memory"])
    save(options.json, results)


def report(title: str, result: dict[str, Any]) -> None:
    """Prints one result, all times as medians."""
    print(title)
    for name, value in result.items():
        if name == "seconds":
            value = {contestant: f"{1e3 * statistics.median(times):.1f} ms" for contestant, times in value.items()}
        if name != "estimates":
            print(f"  {name.replace('_', ' ')}:", json.dumps(value, ensure_ascii=False))


if __name__ == "__main__":
    main()
