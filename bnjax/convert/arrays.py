"""Reading and writing of named arrays in mappings and safetensors files, never in pickles."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bnjax._extras import needs


def read_arrays(source: Any) -> dict[str, np.ndarray]:
    """Reads named arrays of a mapping, a PyTorch module or a safetensors file into NumPy, without importing PyTorch.

    The result is a dict: entries that are not wanted can be deleted, and `|` merges it with the dict of another file.

    Args:
      source: a mapping of names to tensors or arrays, such as a state dict; an object with a `state_dict`; or the path
        of a '.safetensors' file, which needs the extra `safetensors`.

    Returns:
      A dict of NumPy arrays of the same dtypes, bfloat16 included.

    Raises:
      ValueError: for any other file: a pickle, such as a '.pt' or '.pth' file, can run code and is never loaded; and
        for a mapping within the mapping, as in a checkpoint that holds a state dict beside other things.
      TypeError: for a source of another kind.
      MissingExtraError: where safetensors is not installed.

    References:
      The format: https://github.com/huggingface/safetensors

    >>> read_arrays({'weight': jnp.ones(2, jnp.bfloat16)})
    {'weight': array([1, 1], dtype=bfloat16)}
    """
    if isinstance(source, str | os.PathLike):
        path, files = _checked_path("source", source), _safetensors()
        try:
            return {name: _stored(entry) for name, entry in files.deserialize(path.read_bytes())}
        except files.SafetensorError as error:
            raise ValueError(f"source must be a safetensors file, but {path.name} is not one: {error}.") from error
    if hasattr(source, "state_dict"):
        source = source.state_dict()
    if not isinstance(source, Mapping):
        raise TypeError(
            f"source must be a mapping of names to arrays or the path of a .safetensors file, got "
            f"{type(source).__name__}. Pass a model's state_dict()."
        )
    if nested := [name for name, value in source.items() if isinstance(value, Mapping)]:
        raise ValueError(
            f"source must hold arrays, got a mapping at {nested[0]!r}. Where it is the state dict, pass "
            f"source[{nested[0]!r}]."
        )
    return {name: as_numpy(value) for name, value in source.items()}


def save_safetensors(arrays: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Writes named arrays to a safetensors file, which PyTorch users read with `safetensors.torch.load_file`.

    Args:
      arrays: arrays by name, such as `variables_to_torch` gives.
      path: path that ends in '.safetensors'.

    Returns:
      Nothing.

    Raises:
      ValueError: for a path of another ending.
      MissingExtraError: where safetensors is not installed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_safetensors({'weight': np.ones(2)}, f'{folder}/model.safetensors')
    ...     read_arrays(f'{folder}/model.safetensors')
    {'weight': array([1., 1.])}
    """
    path = _checked_path("path", path)
    # Each array has to be contiguous, as its memory is written as it lies.
    _safetensors().numpy.save_file(
        {name: np.require(as_numpy(v), requirements="C") for name, v in arrays.items()}, path
    )


def as_numpy(value: Any) -> np.ndarray:
    """Returns an array, or a tensor of PyTorch on any device, in NumPy."""
    if not hasattr(value, "detach"):
        return np.asarray(value)
    tensor = value.detach().cpu()
    name = str(tensor.dtype).removeprefix("torch.")
    if name == "bfloat16" or name.startswith("float8"):  # dtypes that PyTorch can't hand to NumPy; float32 holds them
        return tensor.float().numpy().astype(jnp.dtype(name))
    return tensor.numpy()


def _stored(entry: Mapping[str, Any]) -> np.ndarray:
    """Returns an array of a safetensors file, also of the dtypes that NumPy has by ml_dtypes only."""
    name = entry["dtype"].lower()
    special = {
        "bf16": "bfloat16",
        "f8_e4m3": "float8_e4m3fn",
        "f8_e5m2": "float8_e5m2",
        "bool": "bool",
        "c64": "complex64",
    }
    kinds = {"f": "float", "i": "int", "u": "uint"}
    try:
        dtype = jnp.dtype(special.get(name) or kinds.get(name[0], name[0]) + name[1:])
    except TypeError:
        raise ValueError(
            f"source must hold arrays of dtypes that NumPy or ml_dtypes have, got {name.upper()}."
        ) from None
    return np.frombuffer(entry["data"], dtype).reshape(entry["shape"])


def _checked_path(argument: str, path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{argument} must be the path of a .safetensors file, got {path.name}. Pickles can run code and are never "
            "loaded. Pass the state dict that torch.load(path, weights_only=True) gives, or a safetensors file."
        )
    return path


def _safetensors() -> Any:
    with needs("safetensors"):
        import safetensors.numpy
    return safetensors
