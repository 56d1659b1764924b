"""A count of what folding saves: operations and instructions of ResNets' inference, with and without batch norms.

python benchmarks/count_folding.py
"""

import re

import jax
import jax.numpy as jnp

from bnjax import models
from bnjax.inference import fold_model
from bnjax.linen import BatchNorm

SHAPE = (8, 224, 224, 3)


def counts(apply, variables, x) -> tuple[float, int, int]:
    """Counts floating-point operations, instructions of the compiled program, and arrays of variables."""
    program = jax.jit(lambda variables, x: apply(variables, x, training=False)).lower(variables, x).compile()
    entry = program.as_text().split("\nENTRY ")[1]
    operations = program.cost_analysis()["flops"]  # pyright: ignore[reportOptionalSubscript]
    return operations, len(re.findall(r"^ +(?:ROOT )?%\S+ = ", entry, re.M)), len(jax.tree.leaves(variables))


def main() -> None:
    """Prints a table of the counts."""
    x = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    print(f"{'network':12}{'':10}{'operations':>12}{'instructions':>14}{'arrays':>8}")
    for name, build in (("ResNet-18", models.resnet18), ("ResNet-50", models.resnet50)):
        model = build(1000, BatchNorm)
        variables = jax.jit(lambda key, model=model: model.init(key, jnp.zeros((1, *SHAPE[1:])), training=False))(
            jax.random.key(0)
        )
        for label, (apply, own) in {
            "": (model.apply, variables),
            "folded": fold_model(model, variables, x, training=False),
        }.items():
            operations, instructions, arrays = counts(apply, own, x)
            print(f"{name:12}{label:10}{operations:12.4g}{instructions:14}{arrays:8}")


if __name__ == "__main__":
    main()
