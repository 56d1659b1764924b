"""The studies' networks in Flax linen, parametrized by their normalizer, and the perceptron by its place too."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Key, Shaped

from bnjax._linen_pairs import ConvBatchNorm
from bnjax._sync import vary_like
from bnjax.models.layers import Conv, Dropout, local_response_norm, max_pool

Norm = Callable[..., nn.Module]
"""A function that makes a normalizer from `use_running_average`: `bnjax.linen.BatchNorm` or a partial of it, say."""
Images = Float[Array, "batch height width channels"]
Logits = Float[Array, "batch classes"]
Mask = Shaped[Array, " batch"] | None
Keys = Key[Array, " batch"] | None


def of_example(layer: Callable[..., nn.Module]) -> Norm:
    """Returns a `Norm` that makes a normalizer of each example, such as `nn.LayerNorm`, without running statistics."""
    return lambda *, use_running_average, **options: layer(**options)


Place = Literal["none", "before", "after", "input"]
"""The place of the normalizer: nowhere, before or after each hidden activation, or on the network's input."""


class Perceptron(nn.Module):
    """A perceptron: `Dense – [norm] – activation – [norm] – [dropout]` for each hidden layer, then a Dense of outputs.

    Attributes:
      hidden: sizes of the hidden layers.
      outputs: size of the output, which has no activation (logits).
      norm: makes the normalizer from `use_running_average`, such as `bnjax.linen.BatchNorm` or a partial of it.
      place: 'none', 'before' or 'after' every hidden activation, or on the 'input'.
      activation: activation function of the hidden layers.
      hidden_init: initializer of the hidden kernels.
      output_init: initializer of the output kernel.
      use_hidden_bias: whether the hidden layers have a bias (which a batch norm before the activation makes redundant).
      weight_norm: whether the hidden kernels are normalized (Salimans & Kingma 2016), by Flax's layer.
      dropout_rate: rate of elements dropped after each hidden layer in training, by Flax's random stream 'dropout'.

    >>> from bnjax.linen import BatchNorm
    >>> model = Perceptron(hidden=(8,), outputs=1, norm=BatchNorm, place='after')
    >>> variables = model.init(jax.random.key(0), jnp.ones((4, 2)), training=False)
    >>> sorted(variables['params'])
    ['BatchNorm_0', 'Dense_0', 'Dense_1']
    """

    hidden: Sequence[int]
    outputs: int
    norm: Norm | None = None
    place: str = "none"
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    hidden_init: Any = nn.initializers.glorot_uniform()
    output_init: Any = nn.initializers.glorot_uniform()
    use_hidden_bias: bool = True
    weight_norm: bool = False
    dropout_rate: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.place not in get_args(Place):
            raise ValueError(f"place must be one of {', '.join(get_args(Place))}, got {self.place!r}.")
        if (self.norm is None) != (self.place == "none"):
            raise ValueError(
                f"norm must be given exactly where place is not 'none', got {self.norm} with {self.place!r}."
            )

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch ..."], *, training: bool, mask: Mask = None
    ) -> Float[Array, "batch outputs"]:
        """Computes logits of a batch; in training, normalized by the batch's statistics, which move the running ones.

        Args:
          x: inputs, flattened to one vector for each example.
          training: whether the normalizer uses the batch's statistics.
          mask: which examples count in the statistics, or with what weight; all by default.
        """

        def normalize(place: str, x):
            return _normalize(self.norm if self.place == place else None, x, training, mask)

        x = normalize("input", _flat(x))
        for size in self.hidden:
            dense = nn.Dense(size, use_bias=self.use_hidden_bias, kernel_init=self.hidden_init)
            x = nn.WeightNorm(dense)(x) if self.weight_norm else dense(x)
            x = normalize("after", self.activation(normalize("before", x)))
            x = nn.Dropout(self.dropout_rate, deterministic=not training)(x) if self.dropout_rate else x
        return nn.Dense(self.outputs, kernel_init=self.output_init)(x)


class RecurrentNetwork(nn.Module):
    """A recurrent network of tanh units, and a Dense layer of logits on its last state.

        h_t = tanh(norm(W_x x_t) + norm(W_h h_{t−1}) + b)

    Without a norm the two products are added as they are. The normalizers have no bias, and scales start at 0.1.

    Attributes:
      num_classes: number of logits.
      hidden: number of units.
      norm: makes a normalizer such as `bnjax.linen.BatchNorm`; None for none.
      is_shared: whether all time steps share running statistics, rather than each having its own.

    References:
      Cooijmans et al. 2016 (arXiv 1603.09025), sections 3 and 4: statistics for each step, and the initial scale.

    >>> from bnjax.linen import BatchNorm
    >>> model = RecurrentNetwork(num_classes=10, hidden=8, norm=BatchNorm)
    >>> variables = model.init(jax.random.key(0), jnp.ones((2, 5, 3)), training=False)
    >>> jax.tree.map(jnp.shape, variables['batch_stats']['cell']['BatchNorm_0'])
    {'mean': (5, 8), 'var': (5, 8)}
    """

    num_classes: int
    hidden: int = 64
    norm: Norm | None = None
    is_shared: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch time features"], *, training: bool) -> Logits:
        """Computes logits of a batch of sequences.

        Args:
          x: sequences of one length.
          training: whether the normalizer uses the batch's statistics, those of each time step.
        """
        options: dict[str, Any] = {"variable_broadcast": "params", "split_rngs": {"params": False}, "in_axes": 1}
        if not self.is_shared:
            options["variable_axes"] = {"batch_stats": 0}
        elif training:
            options["variable_carry"] = "batch_stats"
        else:
            options["variable_broadcast"] = ["params", "batch_stats"]
        state = vary_like(jnp.zeros((x.shape[0], self.hidden), x.dtype), x)
        if self.is_shared and self.is_initializing():  # the statistics that a scan carries have to exist before it
            state, _ = _Cell(self.hidden, self.norm, training, name="cell")(state, x[:, 0])
        else:
            state, _ = nn.scan(_Cell, **options)(self.hidden, self.norm, training, name="cell")(state, x)
        return nn.Dense(self.num_classes)(state)


class _Cell(nn.Module):
    """The recurrent network's cell, which takes one time step."""

    hidden: int
    norm: Norm | None
    training: bool

    @nn.compact
    def __call__(self, state: Array, x: Array) -> tuple[Array, None]:
        def normalized(x: Array) -> Array:
            if self.norm is None:
                return x
            options = {"use_bias": False, "scale_init": nn.initializers.constant(0.1)}
            return self.norm(use_running_average=not self.training, **options)(x)

        from_input = normalized(nn.Dense(self.hidden, use_bias=False)(x))
        from_state = nn.Dense(self.hidden, use_bias=False, kernel_init=nn.initializers.orthogonal())(state)
        bias = self.param("bias", nn.initializers.zeros, (self.hidden,))
        return jnp.tanh(from_input + normalized(from_state) + bias[None]), None


class CifarNetwork(nn.Module):
    """A network of four blocks `2 × (conv – [norm] – activation) – max-pool – dropout`, and one of convolutions alone.

    All kernels are 3 × 3 and initialized as Keras does; the last block's output is flattened for a Dense layer of
    logits.

    Attributes:
      num_classes: number of logits.
      norm: makes the normalizer from `use_running_average`; None for none.
      activation: activation function after each convolution.
      filters: number of filters of the convolutions in the first four blocks.
      last_filters: number of filters of the convolutions in the last block.
      dropout_rate: rate of the four dropouts.
      dtype: dtype of the convolutions, such as bfloat16; inferred by default. Parameters are float32.
      weight_norm: whether the kernels of the convolutions are normalized (Salimans & Kingma 2016), by Flax's layer.

    References:
      The CIFAR-100 article of study S5; Chollet et al. 2015, Keras, for the initializers.

    >>> from bnjax.linen import BatchNorm
    >>> model = CifarNetwork(num_classes=100, norm=BatchNorm)
    >>> variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((1, 32, 32, 3)), training=False))
    >>> sum(p.size for p in jax.tree.leaves(variables['params']))
    414560
    """

    num_classes: int
    norm: Norm | None = None
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    filters: int = 60
    last_filters: int = 100
    dropout_rate: float = 0.15
    dtype: Any = None
    weight_norm: bool = False

    @nn.compact
    def __call__(self, x: Images, *, training: bool, mask: Mask = None, keys: Keys = None) -> Logits:
        """Computes logits of a batch; with `training`, normalized by the batch's statistics and with dropout.

        Args:
          x: images of at least 16 × 16 pixels.
          training: whether the normalizer uses the batch's statistics and elements are dropped.
          mask: which examples count in the statistics, or with what weight; all by default.
          keys: a random key for each example; without them nothing is dropped.
        """
        for block in range(5):
            for _ in range(2):
                features = self.last_filters if block == 4 else self.filters
                conv = Conv(features, (3, 3), kernel_init=nn.initializers.glorot_uniform(), dtype=self.dtype)
                x = nn.WeightNorm(conv)(x) if self.weight_norm else conv(x)
                x = self.activation(_normalize(self.norm, x, training, mask))
            if block < 4:
                x = Dropout(self.dropout_rate)(max_pool(x, 2, 2), keys if training else None)
        x = _flat(x)
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.glorot_uniform())(x)


class VGG(nn.Module):
    """VGG for small images: 3 × 3 convolutions `conv – [norm] – ReLU` in five stages, each ended by a max-pool.

    Santurkar et al. use "a standard VGG" with Glorot initialization on CIFAR-10 and state no more. The default depth is
    our choice, and so are the two Dense layers of 512 with ReLU after the convolutions, without normalizer and dropout,
    in place of 4096 with dropout for ImageNet.

    Attributes:
      num_classes: number of logits.
      norm: makes the normalizer from `use_running_average`; None for none.
      depth: number of layers with kernels: 11, 13, 16 or 19 (configurations A, B, D and E).
      width: filters of the first stage; the last stage and the Dense layers have 8 times as many.
      dtype: dtype of the convolutions, such as bfloat16; inferred by default. Parameters are float32.
      local_response_norm: whether the first two stages end with `bnjax.models.layers.local_response_norm`.
      weight_norm: whether the kernels of the convolutions are normalized (Salimans & Kingma 2016), by Flax's layer.

    References:
      Simonyan & Zisserman 2015, "Very Deep Convolutional Networks for Large-Scale Image Recognition", table 1;
      Santurkar et al. 2018, "How Does Batch Normalization Help Optimization?", section 2 and appendix A.

    >>> from bnjax.linen import BatchNorm
    >>> model = VGG(num_classes=10, norm=BatchNorm, depth=16, width=4)
    >>> variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((1, 32, 32, 3)), training=False))
    >>> len(variables['batch_stats'])
    13
    """

    num_classes: int
    norm: Norm | None = None
    depth: int = 11
    width: int = 64
    dtype: Any = None
    local_response_norm: bool = False
    weight_norm: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.depth not in _VGG_STAGES:
            raise ValueError(f"depth must be one of {', '.join(map(str, _VGG_STAGES))}, got {self.depth}.")

    @nn.compact
    def __call__(self, x: Images, *, training: bool, mask: Mask = None, keys: Keys = None) -> Logits:
        """Computes logits of a batch; with `training`, normalized by the batch's statistics.

        Args:
          x: images of at least 32 × 32 pixels.
          training: whether the normalizer uses the batch's statistics.
          mask: which examples count in the statistics, or with what weight; all by default.
          keys: accepted without effect, as there is no dropout.
        """
        init = nn.initializers.glorot_uniform()
        for stage, layers in enumerate(_VGG_STAGES[self.depth]):
            for _ in range(layers):
                conv = Conv(self.width * min(2**stage, 8), (3, 3), kernel_init=init, dtype=self.dtype)
                x = nn.WeightNorm(conv)(x) if self.weight_norm else conv(x)
                x = nn.relu(_normalize(self.norm, x, training, mask))
            x = local_response_norm(x) if self.local_response_norm and stage < 2 else x
            x = max_pool(x, 2, 2)
        x = _flat(x)
        for _ in range(2):
            x = nn.relu(nn.Dense(8 * self.width, kernel_init=init, dtype=self.dtype)(x))
        return nn.Dense(self.num_classes, kernel_init=init)(x)


_VGG_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class ResNet(nn.Module):
    """A residual network: a stem, four stages of residual blocks, the mean over pixels, and a Dense layer of logits.

    Attributes:
      num_classes: number of logits.
      norm: makes the normalizer from `use_running_average`; None for none, with biases in the convolutions instead.
      stage_sizes: blocks in each stage; the first block of each but the first stage halves height and width.
      bottleneck: whether a block is 1 × 1, 3 × 3 and 1 × 1 convolutions with 4 times the features at its ends and the
        stride in the 3 × 3 convolution ("version 1.5"), rather than two 3 × 3 convolutions.
      stem: 'imagenet' for a 7 × 7 convolution of stride 2 and a 3 × 3 max-pool of stride 2, 'cifar' for a 3 × 3
        convolution alone.
      width: filters of the stem and the first stage; each stage doubles them.
      dtype: dtype of the convolutions, such as bfloat16; inferred by default. Parameters are float32.
      fold: whether 1 × 1 convolutions are folded with their batch norms in training: 'auto' those with more outputs
        than inputs, True all, False none (see `bnjax.linen.ConvBatchNorm`). It changes results by rounding alone.

    References:
      He et al. 2016, "Deep Residual Learning for Image Recognition", sections 3.3, 4.1 and 4.2; for the initializer,
      He et al. 2015, "Delving Deep into Rectifiers", section 2.2.

    >>> from bnjax.linen import BatchNorm
    >>> model = resnet18(num_classes=1000, norm=BatchNorm)
    >>> variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((1, 224, 224, 3)), training=False))
    >>> sum(p.size for p in jax.tree.leaves(variables['params']))
    11689512
    """

    num_classes: int
    norm: Norm | None = None
    stage_sizes: Sequence[int] = (2, 2, 2, 2)
    bottleneck: bool = False
    stem: str = "imagenet"
    width: int = 64
    dtype: Any = None
    fold: bool | str = "auto"

    def __post_init__(self):
        super().__post_init__()
        if self.stem not in ("imagenet", "cifar"):
            raise ValueError(f"stem must be 'imagenet' or 'cifar', got {self.stem!r}.")

    @nn.compact
    def __call__(self, x: Images, *, training: bool, mask: Mask = None, keys: Keys = None) -> Logits:
        """Computes logits of a batch; with `training`, normalized by the batch's statistics.

        Args:
          x: images.
          training: whether the normalizer uses the batch's statistics.
          mask: which examples count in the statistics, or with what weight; all by default.
          keys: accepted without effect, as there is no dropout.
        """

        def conv(x, features: int, size: int, stride: int = 1):
            pads = ((size // 2, size // 2),) * 2
            init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
            options = {"use_bias": self.norm is None, "dtype": self.dtype, "kernel_init": init}
            layer = Conv(features, (size, size), stride, pads, **options)
            return _normalize(self.norm, x, training, mask, conv=layer, fold=self.fold if size == 1 else False)

        def block(x, features: int, stride: int):
            if self.bottleneck:
                y = nn.relu(conv(x, features, 1))
                y = nn.relu(conv(y, features, 3, stride))
                y = conv(y, 4 * features, 1)
            else:
                y = nn.relu(conv(x, features, 3, stride))
                y = conv(y, features, 3)
            return nn.relu(y + (x if x.shape == y.shape else conv(x, y.shape[-1], 1, stride)))

        if self.stem == "imagenet":
            x = max_pool(nn.relu(conv(x, self.width, 7, 2)), 3, 2, ((1, 1), (1, 1)))
        else:
            x = nn.relu(conv(x, self.width, 3))
        for stage, blocks in enumerate(self.stage_sizes):
            for index in range(blocks):
                x = block(x, self.width * 2**stage, 2 if stage > 0 and index == 0 else 1)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


def resnet18(num_classes: int, norm: Norm | None = None, **options) -> ResNet:
    """Makes a ResNet of 18 layers, with two 3 × 3 convolutions a block; `options` are attributes of `ResNet`."""
    return ResNet(num_classes, norm, (2, 2, 2, 2), False, **options)


def resnet50(num_classes: int, norm: Norm | None = None, **options) -> ResNet:
    """Makes a ResNet of 50 layers, with bottleneck blocks; `options` are attributes of `ResNet`."""
    return ResNet(num_classes, norm, (3, 4, 6, 3), True, **options)


def _flat(x: Array) -> Array:
    """Flattens each example to one vector; there may be no examples."""
    return x.reshape((x.shape[0], math.prod(x.shape[1:])))


def _normalize(
    norm: Norm | None, x: Array, training: bool, mask: Array | None, *, conv: Conv | None = None, fold: Any = False
) -> Array:
    """Returns `x`, or its convolution, normalized by a new normalizer of the calling module, if any."""
    if norm is None:
        return x if conv is None else conv(x)
    layer = norm(use_running_average=not training)
    pair = layer if conv is None else ConvBatchNorm(conv, layer, fold=fold)
    if mask is None or not hasattr(layer, "use_running_average"):  # normalizes each example by itself
        return pair(x)
    return pair(x, mask=mask.reshape((-1,) + (1,) * (x.ndim - 1)))
