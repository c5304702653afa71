# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Piecewise-linear units that PyTorch has no module for."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import InvalidData

__all__ = ["Abs", "Maxout"]


class Abs(nn.Module):
    """Elementwise absolute value, a piecewise-linear unit with slopes -1 and 1.

    Example:
        >>> import torch
        >>> Abs()(torch.tensor([-2.0, 3.0]))
        tensor([2., 3.])
    """

    def forward(self, input: Tensor) -> Tensor:
        return input.abs()


class Maxout(nn.Module):
    r"""The greatest of each group of features, :math:`h_i = \max_{j < k} a_{ik + j}`.

    Behind a linear layer with k times as many outputs this is a maxout layer.

    Args:
        pieces: k, features in a group; they stand next to each other.
        dim: dimension of the features; 1 behind a convolution.

    References:
        I. Goodfellow, D. Warde-Farley, M. Mirza, A. Courville, Y. Bengio (2013), "Maxout Networks".

    Example:
        >>> import torch
        >>> Maxout(2)(torch.tensor([[1.0, 5.0, -3.0, -2.0]]))
        tensor([[ 5., -2.]])
    """

    def __init__(self, pieces: int, dim: int = -1) -> None:
        super().__init__()
        if pieces < 1:
            raise InvalidData(f"pieces is {pieces}: a group has at least one feature")
        self.pieces, self.dim = pieces, dim

    def forward(self, input: Tensor) -> Tensor:
        dim = self.dim % input.dim()
        return input.unflatten(dim, (-1, self.pieces)).amax(dim + 1)

    def extra_repr(self) -> str:
        return f"pieces={self.pieces}, dim={self.dim}"
