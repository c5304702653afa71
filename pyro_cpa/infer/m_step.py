# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
r"""The M-step in closed form: every block as the exact minimiser of the expected complete-data loss.

With regions held fixed, each linear layer enters

.. math::

    \tfrac12 \sum_n E\big[\lVert x_n - g(z) \rVert^2_{S_x^{-1}}\big] + \tfrac{\rho}{2} \lVert W \rVert^2

quadratically, and so does the kernel of each convolution. Pure functions of a partition and the statistics of one E-step;
nothing here is written back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..distributions.statistics import SufficientStatistics
from ..partition import Partition

__all__ = ["hidden_layer", "noise_covariance", "other_parameters", "output_layer", "prior_moments"]

# Eigenvalues this small, against the largest, are rounding of the sum over the data, and so are steps along them.
_NULL = 1e-13


def noise_covariance(partition: Partition, statistics: SufficientStatistics) -> Tensor:
    """(D,) variances, or (D, D) covariance: the mean of E[(x - g(z))(x - g(z))']."""
    return statistics.residual(partition.slopes, partition.offsets) / statistics.count


def prior_moments(statistics: SufficientStatistics) -> tuple[Tensor, Tensor]:
    """Mean (L,) and covariance (L, L) of the aggregated posterior."""
    moments = statistics.zz.sum(0) / statistics.count
    mean = moments[-1, :-1]
    return mean, moments[:-1, :-1] - torch.outer(mean, mean)


def output_layer(
    partition: Partition, statistics: SufficientStatistics, noise_scale: Tensor, ridge: float
) -> tuple[Tensor, Tensor | None, int]:
    """New weight (D, H) and bias (D,) of the last layer, and the rank that its normal matrix lacks.

    The layer moves no wall, so that this is a true M-step. Directions that the data do not determine (units that are
    never active) keep their present weights.
    """
    layer = partition.network.linears[-1]
    weight, bias = partition.output_weight, partition.output_bias
    features = _with_one(partition.feature_slopes, partition.feature_offsets)
    gram = torch.einsum("rhj,rjk,rik->hi", features, statistics.zz, features)
    cross = torch.einsum("rdj,rhj->dh", statistics.xz, features)
    current = torch.cat([weight, bias[:, None]], dim=1)
    if layer.bias is None:
        gram, cross, current = gram[:-1, :-1], cross[:, :-1], weight
    gradient = cross - current @ gram
    if ridge == 0:
        inverse, lacking = _pseudo_inverse(gram)
        new = current + gradient @ inverse
    else:
        # Sx^-1 (W G - C) + ridge W = 0, decoupled along the eigenvectors of Sx; biases are not penalised.
        penalty = torch.ones_like(gram[0])
        penalty[weight.shape[1] :] = 0
        variances, basis = _noise_eigen(noise_scale)
        systems = gram + ridge * variances[:, None, None] * torch.diag(penalty)
        target = basis.mT @ (gradient - ridge * _noise_times(noise_scale, current * penalty))
        lacking = _pseudo_inverse(systems[0])[1]
        new = current + basis @ torch.linalg.lstsq(systems, target[..., None]).solution[..., 0]
    if layer.bias is None:
        return new, None, lacking
    return new[:, :-1], new[:, -1], lacking


def hidden_layer(
    partition: Partition,
    statistics: SufficientStatistics,
    noise_scale: Tensor,
    ridge: float,
    index: int,
    max_iterations: int = 50,
    tolerance: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:
    r"""Weight and bias of hidden layer ``index`` that minimise the expected loss with all activations held fixed.

    The normal equations :math:`\sum_r (F_r^\top S_x^{-1} F_r) \Delta\, E[\tilde h \tilde h^\top 1_r] = \ldots` are solved by
    conjugate gradients, preconditioned by a Kronecker product; their matrix is never formed. The layer moves walls, so
    that the result is a direction to be checked against the exact evidence, not a guaranteed ascent.
    """
    layer: nn.Linear = partition.network.linears[index]
    slopes, offsets = partition.linear_inputs(index)
    inputs = _with_one(slopes, offsets)
    if layer.bias is None:
        inputs = inputs[:, :-1]
    white = _divide(noise_scale, partition.downstream(index))
    maps = torch.cat([partition.slopes, partition.offsets[..., None]], dim=-1)
    error = _divide(noise_scale, statistics.xz - maps @ statistics.zz)
    weight = layer.weight.detach().double()
    penalty = torch.full_like(inputs[0, :, 0], ridge)
    penalty[weight.shape[1] :] = 0
    current = (
        weight if layer.bias is None else torch.cat([weight, layer.bias.detach().double()[:, None]], dim=1)
    )

    def normal(delta: Tensor) -> Tensor:
        image = white.mT @ (white @ (delta @ inputs @ statistics.zz))
        return torch.einsum("rhj,rij->hi", image, inputs) + penalty * delta

    right = torch.einsum("rdh,rdj,rij->hi", white, error, inputs) - penalty * current
    left_factor = torch.einsum("rdh,rdk,r->hk", white, white, statistics.zz[:, -1, -1]) / statistics.count
    right_factor = torch.einsum("rhj,rjk,rik->hi", inputs, statistics.zz, inputs)
    left_inverse, right_inverse = _damped_inverse(left_factor), _damped_inverse(right_factor)
    new = current + _conjugate_gradients(
        normal, right, lambda m: left_inverse @ m @ right_inverse, max_iterations, tolerance
    )
    if layer.bias is None:
        return new, None
    return new[:, :-1], new[:, -1]


def other_parameters(
    partition: Partition,
    statistics: SufficientStatistics,
    noise_scale: Tensor,
    parameters: Sequence[Tensor],
    ridges: Sequence[float],
    max_iterations: int = 20,
    tolerance: float = 1e-3,
) -> list[Tensor]:
    r"""Values of any other parameters that minimise the expected loss with all activations held fixed.

    The maps are linearised in the parameters, which changes nothing where they are affine in them (the kernel and bias
    of one convolution, the slopes of a PReLU). The normal equations :math:`J^\top (S_x^{-1} \otimes E[\tilde z \tilde z^\top
    1_r]) J \Delta = \ldots` are solved by conjugate gradients, J and its transpose being derivatives of the maps. Like a
    hidden layer's, the result is a direction to be checked against the exact evidence.
    """
    with torch.enable_grad():
        slopes, offsets = partition.affine_maps()
        maps = torch.cat([slopes, offsets[..., None]], dim=-1)
        dual = torch.zeros_like(maps, requires_grad=True)
        # Linear in ``dual``: its own derivative is the other direction.
        pulled = _flat(torch.autograd.grad(maps, parameters, dual, create_graph=True, materialize_grads=True))
    ridge = _flat([torch.full_like(p, r) for p, r in zip(parameters, ridges, strict=True)])
    current = _flat(parameters).detach()

    def transposed(columns: Tensor) -> Tensor:
        return _flat(
            torch.autograd.grad(maps, parameters, columns, retain_graph=True, materialize_grads=True)
        )

    def normal(delta: Tensor) -> Tensor:
        (image,) = torch.autograd.grad(pulled, dual, delta, retain_graph=True)
        return transposed(_precision_times(noise_scale, image @ statistics.zz)) + ridge * delta

    error = statistics.xz - maps.detach() @ statistics.zz
    right = transposed(_precision_times(noise_scale, error)) - ridge * current
    new = current + _conjugate_gradients(normal, right, lambda m: m, max_iterations, tolerance)
    parts = new.split([p.numel() for p in parameters])
    return [part.reshape(p.shape) for part, p in zip(parts, parameters, strict=True)]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.double().flatten() for t in tensors])


def _conjugate_gradients(
    normal: Callable[[Tensor], Tensor],
    right: Tensor,
    precondition: Callable[[Tensor], Tensor],
    max_iterations: int,
    tolerance: float,
) -> Tensor:
    """Solve normal(delta) = right from delta = 0; on a singular system the part in its range."""
    delta, residual = torch.zeros_like(right), right
    ahead = precondition(residual)
    direction, slope = ahead, (residual * ahead).sum()
    goal = tolerance**2 * slope
    for _ in range(max_iterations):
        if not bool(slope > goal):
            break
        image = normal(direction)
        curvature = (direction * image).sum()
        if not bool(curvature > 0):
            break
        step = slope / curvature
        delta, residual = delta + step * direction, residual - step * image
        ahead = precondition(residual)
        slope, previous = (residual * ahead).sum(), slope
        direction = ahead + slope / previous * direction
    return delta


def _with_one(slopes: Tensor, offsets: Tensor) -> Tensor:
    """(R, H + 1, L + 1): the map from z~ = (z, 1) to (h, 1)."""
    top = torch.cat([slopes, offsets[..., None]], dim=-1)
    one = torch.zeros_like(top[:, :1])
    one[..., -1] = 1
    return torch.cat([top, one], dim=1)


def _divide(noise_scale: Tensor, columns: Tensor) -> Tensor:
    """Lx^-1 columns, for columns (..., D, C)."""
    if noise_scale.dim() == 1:
        return columns / noise_scale[:, None]
    return torch.linalg.solve_triangular(noise_scale, columns, upper=False)


def _precision_times(noise_scale: Tensor, columns: Tensor) -> Tensor:
    """Sx^-1 columns, for columns (..., D, C)."""
    if noise_scale.dim() == 1:
        return columns / noise_scale[:, None] ** 2
    return torch.cholesky_solve(columns, noise_scale)


def _noise_times(noise_scale: Tensor, columns: Tensor) -> Tensor:
    """Sx columns."""
    if noise_scale.dim() == 1:
        return noise_scale[:, None] ** 2 * columns
    return noise_scale @ (noise_scale.mT @ columns)


def _noise_eigen(noise_scale: Tensor) -> tuple[Tensor, Tensor]:
    if noise_scale.dim() == 1:
        return noise_scale**2, torch.eye(len(noise_scale), dtype=noise_scale.dtype, device=noise_scale.device)
    found = torch.linalg.eigh(noise_scale @ noise_scale.mT)
    return found.eigenvalues, found.eigenvectors


def _pseudo_inverse(gram: Tensor) -> tuple[Tensor, int]:
    """Inverse of a positive semi-definite matrix on its range, and the dimension of its null space."""
    # Scaled to unit diagonal, so that features of very different size are not taken for a null direction.
    scale = gram.diagonal().clamp(min=0).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    values, vectors = torch.linalg.eigh(gram / scale / scale[:, None])
    used = values > values[-1] * _NULL
    inverse = torch.where(used, 1 / torch.where(used, values, 1.0), 0.0)
    return (vectors * inverse) @ vectors.mT / scale / scale[:, None], int((~used).sum())


def _damped_inverse(matrix: Tensor) -> Tensor:
    """Preconditioners only: damped by a ten-thousandth of the mean eigenvalue, so that dead units do not dominate."""
    size = len(matrix)
    damping = 1e-4 * matrix.diagonal().mean() + torch.finfo(matrix.dtype).tiny
    eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.inv(matrix + damping * eye)
