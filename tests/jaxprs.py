"""What stands in a traced program."""

import jax


def operations(jaxpr):
    """The operations of a program and of the programs in it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values())):
            if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
                yield from operations(getattr(value, "jaxpr", value))
