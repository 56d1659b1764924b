"""Draws the README's figure, docs/figures/accuracy.png: `python tools/make_readme_figure.py`.

Batches of 4096 normal numbers around a mean of 1 to 10⁶ standard deviations are normalized in float32. In float64 the
standard deviation of the result is 1; the figure shows how far it is from that, the largest of 8 batches.
"""

from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from matplotlib.figure import Figure

from bnjax.analysis.plots import line_style
from bnjax.linen import BatchNorm

OUT = Path(__file__).parents[1] / "docs" / "figures" / "accuracy.png"
LAYERS = {
    "flax.linen.BatchNorm": nn.BatchNorm(use_running_average=False),
    "flax, use_fast_variance=False": nn.BatchNorm(use_running_average=False, use_fast_variance=False),
    "bnjax.linen.BatchNorm": BatchNorm(use_running_average=False),
}
MEANS = np.logspace(0, 6, 25)


def main() -> None:
    """Measures the errors and draws the figure."""
    numbers = np.random.default_rng(0).standard_normal((4096, 8))
    figure = Figure(figsize=(7, 3), layout="constrained")
    axis = figure.subplots()
    for i, (label, layer) in enumerate(LAYERS.items()):
        variables = layer.init(jax.random.key(0), numbers.astype(np.float32))
        apply = jax.jit(
            lambda x, layer=layer, variables=variables: layer.apply(variables, x, mutable=["batch_stats"])[0]
        )
        errors = []
        for mean in MEANS:
            x = (mean + numbers).astype(np.float32)
            exact = x.astype(np.float64).std(0)  # the deviation of the rounded numbers, which are normalized
            expected = exact / np.sqrt(exact**2 + 1e-5)
            errors.append(np.abs(np.asarray(apply(x), np.float64).std(0) / expected - 1).max())
        axis.loglog(MEANS, np.maximum(errors, 1e-8), label=label, **line_style(i))
    axis.set_xlabel("mean / standard deviation of the batch")
    axis.set_ylabel("relative error of the result's\nstandard deviation")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(OUT, dpi=120)


if __name__ == "__main__":
    main()
