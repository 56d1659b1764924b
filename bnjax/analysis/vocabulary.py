"""The cross-entropy of tokens over a large vocabulary, without an array of tokens times vocabulary."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer


def chunked_cross_entropy(
    features: Float[Array, "*tokens d"],
    kernel: Float[Array, "d vocabulary"],
    labels: Integer[Array, "*tokens"],
    *,
    bias: Float[Array, " vocabulary"] | None = None,
    chunk_size: int = 128,
) -> Float[Array, "*tokens"]:
    """Computes the cross-entropy of a linear softmax layer for each token, some tokens at a time.

        log Σ_j exp(z_j) − z_label        with z = features · kernel + bias

    Logits of `chunk_size` tokens are held at once, forward, backward, and in Hessian products: each derivative computes
    them anew. (Of Fisher and Gauss–Newton matrices `bnjax.analysis.fisher_operator` takes the same layer as `head`.)

    Args:
      features: inputs of the layer, `[…, d]`.
      kernel: weights, `[d, vocabulary]`; of tied embeddings their transpose.
      labels: numbers of the right tokens, integers `[…]`, at least 0 and below the size of the vocabulary; another one
        gives NaN.
      bias: biases, `[vocabulary]`.
      chunk_size: number of tokens at once, at least 1; static.

    Returns:
      Losses `[…]` in float32 at least. Leave tokens out by weights, with any label in range for them, as zero times NaN
      is NaN: `(w * losses).sum() / w.sum()`.

    Raises:
      ValueError: for a chunk size below 1.

    >>> from bnjax import analysis
    >>> h, kernel = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.eye(2, 3)
    >>> print(analysis.chunked_cross_entropy(h, kernel, jnp.array([0, 2]), chunk_size=1).round(4))
    [0.5514 2.2395]
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    dtype = jnp.promote_types(jnp.float32, jnp.promote_types(features.dtype, kernel.dtype))

    def of_token(token: tuple[Array, Array]) -> Array:
        feature, label = token
        logits = jnp.matmul(feature, kernel, preferred_element_type=dtype)
        logits = logits if bias is None else logits + bias.astype(dtype)
        is_known = (label >= 0) & (label < logits.size)
        chosen = jnp.where(is_known, logits[jnp.where(is_known, label, 0)], jnp.nan)
        return jax.nn.logsumexp(logits) - chosen

    tokens = features.reshape((-1, features.shape[-1])), labels.ravel()
    # The checkpoint keeps nothing of a token but itself for the derivatives.
    return lax.map(jax.checkpoint(of_token), tokens, batch_size=chunk_size).reshape(labels.shape)
