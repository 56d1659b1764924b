"""Measurements of why batch norm works: pure functions of a `loss_fn(params, *args) -> scalar` and pytrees.

They cover smoothness along the gradient, internal covariate shift, curvature, loss surfaces, gradients and activations.
All can be jitted, vmapped (over seeds, learning rates, …) and used inside scans; none has a hidden jit, so wrap what is
called often: `jax.jit(functools.partial(gradient_probe, loss_fn))`. Nothing in here knows Flax: the caller's loss
decides which function is measured, batch norm's mode included, and `bnjax.analysis.losses` makes losses of Flax
models. Figures are in `bnjax.analysis.plots`. Arrays on a mesh are taken with its axes of type Auto (as
`bnjax.training.make_mesh` makes them); under explicit axes reshard them to `P()` first.
"""

from bnjax.analysis.activations import ActivationStatistics, activation_statistics
from bnjax.analysis.curvature import (
    fisher_operator,
    gauss_newton_operator,
    gauss_newton_product,
    gradient_covariance_operator,
    hessian_operator,
    hessian_product,
)
from bnjax.analysis.diagonals import DiagonalEstimate, diagonal, hessian_diagonal
from bnjax.analysis.eigen import Eigenpairs, eigenpairs, hessian_eigenpairs, layer_eigenpairs, layer_weights
from bnjax.analysis.gradients import ScaleInvariance, gradient_norms, sam_sharpness, scale_invariance
from bnjax.analysis.loop import LearningRateRange, learning_rate_range, measured_scan
from bnjax.analysis.noise import GradientConfusion, GradientNoise, gradient_confusion, gradient_noise_scale
from bnjax.analysis.operators import SymmetricOperator
from bnjax.analysis.probe import GradientProbe, gradient_probe
from bnjax.analysis.selection import restrict
from bnjax.analysis.sharding import shard_loss
from bnjax.analysis.shift import CovariateShift, covariate_shift
from bnjax.analysis.spectrum import SpectralDensity, frobenius_norm, log_determinant, spectral_density
from bnjax.analysis.surface import (
    LinearPath,
    TrajectoryPlane,
    filter_normalize,
    linear_path,
    loss_surface,
    random_direction,
    trajectory_plane,
)
from bnjax.analysis.traces import TraceEstimate, hessian_trace, layer_traces, trace
from bnjax.analysis.vocabulary import chunked_cross_entropy

__all__ = [
    "ActivationStatistics",
    "CovariateShift",
    "DiagonalEstimate",
    "Eigenpairs",
    "GradientConfusion",
    "GradientNoise",
    "GradientProbe",
    "LearningRateRange",
    "LinearPath",
    "ScaleInvariance",
    "SpectralDensity",
    "SymmetricOperator",
    "TraceEstimate",
    "TrajectoryPlane",
    "activation_statistics",
    "chunked_cross_entropy",
    "covariate_shift",
    "diagonal",
    "eigenpairs",
    "filter_normalize",
    "fisher_operator",
    "frobenius_norm",
    "gauss_newton_operator",
    "gauss_newton_product",
    "gradient_confusion",
    "gradient_covariance_operator",
    "gradient_noise_scale",
    "gradient_norms",
    "gradient_probe",
    "hessian_diagonal",
    "hessian_eigenpairs",
    "hessian_operator",
    "hessian_product",
    "hessian_trace",
    "layer_eigenpairs",
    "layer_traces",
    "layer_weights",
    "learning_rate_range",
    "linear_path",
    "log_determinant",
    "loss_surface",
    "measured_scan",
    "random_direction",
    "restrict",
    "sam_sharpness",
    "scale_invariance",
    "shard_loss",
    "spectral_density",
    "trace",
    "trajectory_plane",
]
