# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""How many parameters a decoder really has: those that no symmetry of p(x) makes redundant."""

from __future__ import annotations

from torch import nn

__all__ = ["count_parameters"]

# Units with f(c u) = c f(u) for c > 0: a hidden unit's scale can move to the next layer.
_HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.PReLU)


def count_parameters(module: nn.Module) -> int:
    r"""Trainable parameters less the dimensions along which p(x) does not change.

    Two continuous symmetries leave :math:`p(x)` as it is when z has a standard normal prior:

    - rotating z, absorbed by the first layer :math:`W_1 \in R^{H \times L}`: with :math:`r = \min(H, L)`,
      :math:`\; rL - r(r + 1)/2` dimensions;
    - scaling a ReLU, LeakyReLU or PReLU unit that stands between two linear layers: one dimension each.

    Args:
        module: a decoder, or a module that holds one decoder and other parameters (noise).

    Returns:
        The number that AIC and BIC should be charged for.

    Note:
        For generic weights of plain chains of linear layers and such units this is the rank of the Fisher
        information; other modules are charged for every number they hold. Units that are never active lower
        the true rank further: for them AIC and BIC are conservative.

    Example:
        >>> count_parameters(nn.Linear(2, 5))  # 2 * 5 + 5, less one rotation of the plane
        14
        >>> count_parameters(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)))
        42
    """
    total = sum(p.numel() for p in module.parameters() if p.requires_grad)
    chain = _find_chain(module)
    return total - _rotations(chain) - _scales(chain)


def _find_chain(module: nn.Module) -> list[nn.Module]:
    """The leaf modules of the one chain of linear layers in ``module``; empty where it is no plain chain."""
    if isinstance(module, nn.Linear):
        return [module]
    if isinstance(module, nn.Sequential):
        leaves = [leaf for child in module for leaf in (_find_chain(child) or [child])]
        return leaves if leaves and isinstance(leaves[0], nn.Linear) else []
    chains = [chain for child in module.children() if (chain := _find_chain(child))]
    return chains[0] if len(chains) == 1 else []


def _rotations(chain: list[nn.Module]) -> int:
    first = chain[0] if chain else None
    if not isinstance(first, nn.Linear) or not first.weight.requires_grad:
        return 0
    L, rank = first.in_features, min(first.out_features, first.in_features)
    return rank * L - rank * (rank + 1) // 2


def _scales(chain: list[nn.Module]) -> int:
    count = 0
    for before, unit, after in zip(chain, chain[1:], chain[2:], strict=False):
        if isinstance(unit, _HOMOGENEOUS) and isinstance(before, nn.Linear) and isinstance(after, nn.Linear):
            trainable = before.weight.requires_grad and after.weight.requires_grad
            count += before.out_features if trainable else 0
    return count
