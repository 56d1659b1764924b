"""The measurements against loops of PyTorch's autograd, on one convolutional network with identical weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy.sparse.linalg import LinearOperator, eigsh

from bnjax import analysis, training
from bnjax._compat import enable_x64
from bnjax.analysis import losses
from bnjax.linen import BatchNorm
from bnjax.models.layers import Conv

torch = pytest.importorskip("torch")

STEPS = (0.05, 0.2, 0.4)
LAYERS = [("Conv_0", "BatchNorm_0"), ("Dense_0",), ("Dense_1",)]


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, *, training):
        x = nn.tanh(BatchNorm(use_running_average=not training)(Conv(3, (3, 3), dtype=x.dtype)(x)))
        x = nn.tanh(nn.Dense(4)(x.reshape((x.shape[0], -1))))
        return nn.Dense(3)(x)


@pytest.fixture(scope="module")
def pair():
    """What ours measures, and the loss, parameters and their names in PyTorch."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 4, 4, 2)), rng.integers(0, 3, 8)
    with enable_x64():
        model = Network()
        variables = model.init(jax.random.key(0), jnp.asarray(x), training=False)
        params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)) * 0.4, variables["params"])
        loss = losses.linen_loss(model, variables, training.cross_entropy)
        batch = jnp.asarray(x), jnp.asarray(y)

        @jax.jit
        def measured(params, x, y):
            gradient = jax.grad(loss)(params, x, y)
            following = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
            return {
                "probe": analysis.gradient_probe(loss, params, jnp.array(STEPS), x, y),
                "product": analysis.hessian_product(loss, params, gradient, x, y),
                "shift": analysis.covariate_shift(loss, params, following, x, y, layers=LAYERS),
                "eigen": analysis.hessian_eigenpairs(loss, params, 1, x, y, key=jax.random.key(0), num_steps=60),
            }

        found = jax.device_get(measured(params, *batch))
    # Kernels in PyTorch's layout; its flattening goes through channels first, so ours is done by hand there.
    named = {"/".join(key.key for key in path): np.asarray(p) for path, p in jax.tree.leaves_with_path(params)}
    tensors = {name: torch.tensor(value, requires_grad=True) for name, value in named.items()}
    images, labels = torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(y)

    def torch_loss(p):
        kernel = p["Conv_0/kernel"].permute(3, 2, 0, 1)
        h = torch.nn.functional.conv2d(images, kernel, p["Conv_0/bias"], padding=1)
        h = torch.nn.functional.batch_norm(h, None, None, p["BatchNorm_0/scale"], p["BatchNorm_0/bias"], True)
        h = torch.tanh(h).permute(0, 2, 3, 1).reshape(len(images), -1)
        h = torch.tanh(h @ p["Dense_0/kernel"] + p["Dense_0/bias"])
        return torch.nn.functional.cross_entropy(h @ p["Dense_1/kernel"] + p["Dense_1/bias"], labels)

    return found, torch_loss, tensors


def gradient_of(loss, tensors, **options):
    return dict(zip(tensors, torch.autograd.grad(loss(tensors), list(tensors.values()), **options), strict=True))


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors.values()]).detach().numpy()


def detached(tensors):
    return {name: t.detach().requires_grad_() for name, t in tensors.items()}


@pytest.mark.exhaustive
def test_probe(pair):
    found, loss, tensors = pair
    gradient = gradient_of(loss, tensors)
    g, probe = flat(gradient), found["probe"]
    np.testing.assert_allclose(probe.base_loss, loss(tensors).item(), rtol=1e-10)
    np.testing.assert_allclose(probe.gradient_norm, np.linalg.norm(g), rtol=1e-9)
    for i, step in enumerate(STEPS):
        moved = detached({name: t - step * gradient[name] for name, t in tensors.items()})
        there = flat(gradient_of(loss, moved))
        distance = np.linalg.norm(there - g)
        np.testing.assert_allclose(probe.loss[i], loss(moved).item(), rtol=1e-10)
        np.testing.assert_allclose(probe.gradient_distance[i], distance, rtol=1e-8)
        np.testing.assert_allclose(probe.smoothness[i], distance / step / np.linalg.norm(g), rtol=1e-8)
        cosine = there @ g / np.linalg.norm(there) / np.linalg.norm(g)
        np.testing.assert_allclose(probe.gradient_cosine[i], cosine, rtol=1e-8)


def hessian_product(loss, tensors, vector):
    gradient = gradient_of(loss, tensors, create_graph=True)
    product = sum((gradient[name] * vector[name]).sum() for name in tensors)
    return dict(zip(tensors, torch.autograd.grad(product, list(tensors.values())), strict=True))


def test_hessian_product(pair):
    found, loss, tensors = pair
    gradient = {name: g.detach() for name, g in gradient_of(loss, tensors).items()}
    expected = hessian_product(loss, tensors, gradient)
    ours = {"/".join(k.key for k in path): v for path, v in jax.tree.leaves_with_path(found["product"])}
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value.numpy(), rtol=1e-7, atol=1e-10)


def test_covariate_shift(pair):
    found, loss, tensors = pair
    gradient = gradient_of(loss, tensors)
    for i, layer in enumerate(LAYERS):
        before = {part for parts in LAYERS[:i] for part in parts}
        ahead = detached({n: t - 0.1 * gradient[n] if n.split("/")[0] in before else t for n, t in tensors.items()})
        there = gradient_of(loss, ahead)
        names = [n for n in tensors if n.split("/")[0] in layer]
        change = flat({n: there[n] - gradient[n] for n in names})
        np.testing.assert_allclose(found["shift"].distance[i], np.linalg.norm(change), rtol=1e-7, atol=1e-12)


def test_largest_eigenvalue(pair):
    """Against ARPACK's, of PyTorch's products."""
    found, loss, tensors = pair
    sizes = np.cumsum([t.numel() for t in tensors.values()])

    def product(vector):
        parts = np.split(np.ravel(vector), sizes[:-1])
        shaped = {n: torch.tensor(p).reshape(t.shape) for (n, t), p in zip(tensors.items(), parts, strict=True)}
        return flat(hessian_product(loss, tensors, shaped))

    operator = LinearOperator((sizes[-1], sizes[-1]), matvec=product, dtype=np.float64)
    (value,) = eigsh(operator, 1, which="LA", tol=1e-8, v0=np.ones(sizes[-1]), return_eigenvectors=False)
    np.testing.assert_allclose(found["eigen"].values[0], value, rtol=1e-6)
