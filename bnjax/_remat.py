"""Checkpoints that say what is kept for the backward pass and what is computed anew in it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from bnjax._compat import is_in_jet

_INPUT = "batch_norm_input"
_saves_inputs = jax.checkpoint_policies.save_only_these_names(_INPUT)


def keeping_arguments(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Makes a function that keeps nothing but its arguments for the backward pass.

    Within one compiled program XLA may share what would be computed anew: barriers against that cost reads and writes
    of the input (`benchmarks/count_tpu.py`).
    """
    nothing = jax.checkpoint_policies.nothing_saveable
    checkpointed = jax.checkpoint(function, policy=nothing, prevent_cse=False, **options)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        is_plain = any(map(is_in_jet, arguments))  # `jet` has no rule for checkpoints, and no backward pass
        return function(*arguments) if is_plain else checkpointed(*arguments)

    return call


@jax.custom_jvp
def named_input(x: jax.Array) -> jax.Array:
    """Returns `x`, where it is differentiated under the name that `save_batch_norm_inputs` keeps.

    A program without derivatives holds no name, of which JAX's `jet` and exporters know nothing.
    """
    return x


@named_input.defjvp
def _named_input_jvp(primals, tangents):
    """Names `x` twice.

    Under the policy an outer checkpoint keeps the array of the first name, and in its backward pass computes that of
    the second one from it. The batch norm's own checkpoints (`keeping_arguments`) are given this second array, so that
    they share the kept one; given the first array, JAX would keep a copy for each of them.
    """
    return checkpoint_name(checkpoint_name(primals[0], _INPUT), f"{_INPUT}_again"), tangents[0]


def save_batch_norm_inputs(prim: Any, *args: Any, **params: Any) -> bool:
    """Keeps only batch norms' inputs for the backward pass, as a policy of `jax.checkpoint` and Flax's `remat`.

    Layers between a batch norm and the next linear layer are computed anew in the backward pass, without the latter:
    its output is the next batch norm's input, and is kept. In training that takes the memory of one activation for each
    batch norm (and its ReLU), where else up to four are kept.

    Args:
      prim: JAX's primitive; `jax.checkpoint` passes it.
      *args: abstract inputs of the primitive.
      **params: parameters of the primitive.

    Returns:
      Whether the primitive's outputs are kept.

    Raises:
      Nothing.

    References:
      Chen et al. 2016 (arXiv 1604.06174); Rota Bulò et al. 2018 (arXiv 1712.02616), who invert the output instead.

    >>> import bnjax
    >>> params, batch_stats = bnjax.init_batch_norm(3)
    >>> layer = lambda x: jax.nn.relu(bnjax.batch_norm(x, params, batch_stats, training=True)[0])
    >>> layers = jax.checkpoint(lambda x: layer(layer(x) @ jnp.eye(3)), policy=bnjax.save_batch_norm_inputs)
    >>> print(jax.grad(lambda x: layers(x).sum())(jnp.ones((2, 3))).shape)
    (2, 3)
    """
    return _saves_inputs(prim, *args, **params)
