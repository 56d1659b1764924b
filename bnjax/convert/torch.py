"""Conversion between PyTorch (state dicts or safetensors) and Flax, and torchvision's names of our ResNet's layers."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from bnjax.convert._framework import Framework, Names, batch_norm_from, variables_from, variables_to
from bnjax.convert.arrays import read_arrays
from bnjax.convert.state import BatchNormState

TORCH = Framework(
    title="PyTorch",
    separator=".",
    leaves={
        **dict.fromkeys(("kernel", "scale", "embedding"), "weight"),
        **dict.fromkeys(("linear bias", "bias"), "bias"),
        **{"mean": "running_mean", "var": "running_var"},
    },
    ignored=("num_batches_tracked",),
    out_first=True,
    transposed_swaps=True,
    transposed_flips=True,
)


def batch_norm_from_torch(
    source: Any, prefix: str = "", *, momentum: float | None = 0.1, eps: float = 1e-5
) -> BatchNormState:
    """Converts a batch norm of PyTorch, whose momentum p weighs the new value and whose running variance is unbiased:

        r ← (1 − p) r + p s, with s = n / (n − 1) times the batch's variance; p = 1 / T in step T for momentum None

    Args:
      source: a module, of which momentum and eps are taken; a state dict; or the path of a '.safetensors' file.
      prefix: name of the batch norm in the source, such as 'layer1.0.bn1'.
      momentum: PyTorch's, where `source` is no module; None for the cumulative average.
      eps: PyTorch's, where `source` is no module.

    Returns:
      The batch norm; its `decay` is 1 − p.

    Raises:
      ValueError: for missing or misshapen arrays, or a file other than safetensors, such as a pickle.

    References:
      torch/nn/modules/batchnorm.py in PyTorch 2.13.

    >>> names = ('weight', 'bias', 'running_mean', 'running_var')
    >>> state = batch_norm_from_torch({f'bn1.{name}': np.ones(3) for name in names}, 'bn1', momentum=0.2)
    >>> state.options()
    {'momentum': 0.8, 'epsilon': 1e-05, 'bessel_correction': True}
    """
    if hasattr(source, "get_submodule"):
        source, prefix = source.get_submodule(prefix), ""
        momentum, eps = getattr(source, "momentum", momentum), getattr(source, "eps", eps)
    arrays = read_arrays(source)
    params, batch_stats = batch_norm_from(TORCH, arrays, prefix)
    steps = arrays.get(f"{prefix}.num_batches_tracked" if prefix else "num_batches_tracked", 0)
    return BatchNormState(
        params,
        batch_stats,
        epsilon=eps,
        decay=None if momentum is None else 1 - momentum,
        bessel_correction=True,
        update="cumulative" if momentum is None else "exponential",
        steps=int(steps),
    )


def batch_norm_to_torch(state: BatchNormState, prefix: str = "") -> dict[str, np.ndarray]:
    """Returns the state dict of a batch norm in NumPy, for `load_state_dict({k: torch.from_numpy(v) for k, v in …})`.

    The module is `BatchNorm2d(features, eps=state.epsilon, momentum=1 - state.decay)`, or with momentum None where the
    rule is 'cumulative'. Its training is then PyTorch's: with Bessel's correction, and never debiased.

    Args:
      state: the batch norm.
      prefix: name of the batch norm in the state dict.

    Returns:
      Arrays by PyTorch's names, num_batches_tracked included.

    >>> state = BatchNormState({}, {'mean': np.zeros(2), 'var': np.ones(2)})
    >>> sorted(batch_norm_to_torch(state))
    ['num_batches_tracked', 'running_mean', 'running_var']
    """
    return variables_to_torch(state.variables, lambda _: prefix, steps=state.steps)


def variables_from_torch(source: Any, like: Any, names: Names = None, *, transposed: Collection[str] = ()) -> Any:
    """Converts the variables of a PyTorch model to those of a Flax model.

    Kernels [out, in, *window] become [*window, in, out]. A transposed convolution's kernel, [in, out, *window], becomes
    that of `nn.ConvTranspose`, [*window, in, out], with its window reversed. Mind two differences of the models
    themselves: PyTorch pads both sides alike, `padding=((1, 1), (1, 1))` and not 'SAME'; and it flattens [channels,
    height, width], so that images have to be transposed to that order before a Dense layer.

    Args:
      source: a module, a state dict, or the path of a '.safetensors' file.
      like: variables of the Flax model, or their shapes: `jax.eval_shape(model.init, …)`.
      names: PyTorch's name of each of our modules, such as {'Conv_0': 'features.0'}; a function of our path does too.
        By default 'block/Conv_0' is 'block.Conv_0'.
      transposed: our paths of transposed convolutions, in addition to those called 'ConvTranspose…'.

    Returns:
      Variables in the structure, shapes and dtypes of `like`.

    Raises:
      ValueError: for missing, unused or misshapen arrays and modules without a name, all in one message.

    References:
      The layouts: torch.nn.Linear, Conv2d and ConvTranspose2d; flax.linen.ConvTranspose.

    >>> import flax.linen as nn
    >>> like = jax.eval_shape(nn.Dense(2).init, jax.random.key(0), jnp.ones((1, 3)))
    >>> variables = variables_from_torch({'fc.weight': np.ones((2, 3)), 'fc.bias': np.zeros(2)}, like, {'': 'fc'})
    >>> jax.tree.map(jnp.shape, variables)
    {'params': {'bias': (2,), 'kernel': (3, 2)}}
    """
    return variables_from(TORCH, read_arrays(source), like, names, transposed)


def variables_to_torch(
    variables: Any, names: Names = None, *, steps: int = 0, transposed: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """Converts the variables of a Flax model to a PyTorch model's state dict in NumPy; `save_safetensors` writes it.

    Arrays become tensors by `torch.from_numpy`, or by way of a file where they are bfloat16, which it does not take.

    Args:
      variables: variables of the Flax model.
      names: names of our modules, as in `variables_from_torch`.
      steps: number of training steps, the num_batches_tracked of every batch norm.
      transposed: transposed convolutions, as in `variables_from_torch`.

    Returns:
      Arrays by PyTorch's names.

    Raises:
      ValueError: for modules without a name, or several of one name.

    >>> variables = {'params': {'kernel': jnp.ones((3, 3, 8, 16))}}
    >>> jax.tree.map(jnp.shape, variables_to_torch(variables, {'': 'conv1'}))
    {'conv1.weight': (16, 8, 3, 3)}
    """
    arrays = variables_to(TORCH, variables, names, transposed)
    for key in [key for key in arrays if key.endswith("running_mean")]:
        arrays[key.removesuffix("running_mean") + "num_batches_tracked"] = np.array(steps, np.int64)
    return arrays


def torchvision_names(like: Any) -> dict[str, str]:
    """Returns torchvision's names of the modules of a `bnjax.models.ResNet`, of any depth and kind of block.

    They are those of timm's plain ResNets too, whose shortcuts are a convolution and a batch norm (`downsample_conv`).
    The network is torchvision's where its normalizer is `bnjax.linen.BatchNorm`; in training too, with
    `functools.partial(BatchNorm, momentum=0.9, bessel_correction=True)`.

    Args:
      like: variables of the ResNet with a batch norm, or their shapes.

    Returns:
      Names such as 'layer1.0.downsample.1' by our names, such as 'BatchNorm_3'.

    Raises:
      ValueError: for variables of another model.

    References:
      torchvision/models/resnet.py; timm/models/resnet.py

    >>> from bnjax.linen import BatchNorm
    >>> from bnjax.models import resnet18
    >>> model = resnet18(num_classes=1000, norm=BatchNorm)
    >>> like = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((1, 224, 224, 3)), training=False))
    >>> names = torchvision_names(like)
    >>> [names[path] for path in ('Conv_0', 'BatchNorm_1', 'Conv_7', 'Dense_0')]
    ['conv1', 'layer1.0.bn1', 'layer2.0.downsample.0', 'fc']
    """
    params = like.get("params", {}) if isinstance(like, Mapping) else {}
    kernels = [params[f"Conv_{i}"]["kernel"].shape for i in range(len(params)) if f"Conv_{i}" in params]
    norms = {path.rpartition("_")[0] for path in params} - {"Conv", "Dense"}
    per_block = 3 if len(kernels) > 1 and kernels[1][0] == 1 else 2
    if not kernels or len(norms) != 1 or "Dense_0" not in params or len(params) != 2 * len(kernels) + 1:
        raise ValueError(
            "like must hold the variables of a bnjax.models.ResNet with a batch norm, got the modules "
            f"{', '.join(sorted(params)) or 'of none'}. Pass what its init gives."
        )
    theirs = [("conv1", "bn1")]
    stage, block = 1, 0
    while len(theirs) < len(kernels):
        first, last = kernels[len(theirs)], kernels[len(theirs) + per_block - 1]
        widens = first[-2] != last[-1]  # then the shortcut past the block has a convolution too
        if widens and block > 0:
            stage, block = stage + 1, 0
        name = f"layer{stage}.{block}"
        theirs += [(f"{name}.conv{i}", f"{name}.bn{i}") for i in range(1, per_block + 1)]
        theirs += [(f"{name}.downsample.0", f"{name}.downsample.1")] if widens else []
        block += 1
    norm = norms.pop()
    names = {f"{ours}_{i}": pair[j] for i, pair in enumerate(theirs) for j, ours in enumerate(("Conv", norm))}
    return {**names, "Dense_0": "fc"}
