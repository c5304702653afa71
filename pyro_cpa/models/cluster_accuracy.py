# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""How well unsupervised clusters match known classes."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_cpa.errors import InvalidData

__all__ = ["cluster_accuracy"]


def cluster_accuracy(clusters: Tensor, labels: Tensor) -> tuple[float, dict[int, int]]:
    r"""Share of rows whose cluster is matched to their class, under the best one-to-one matching.

    .. math:: \max_{\pi} \frac1N \sum_n 1[\pi(c_n) = y_n]

    Args:
        clusters: (N,) integers from 0, for example ``gmvae.cluster(x)``.
        labels: (N,) true classes, integers from 0. Their number may differ from that of the clusters.

    Returns:
        The accuracy, and the class matched to each cluster that has one.

    Raises:
        InvalidData: For other shapes or negative entries.

    Note:
        Exact (Hungarian algorithm); needs scipy.

    Example:
        >>> cluster_accuracy(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 1, 0, 1]))
        (0.75, {0: 1, 1: 0})
    """
    from scipy.optimize import linear_sum_assignment

    clusters, labels = (torch.as_tensor(values).detach().cpu() for values in (clusters, labels))
    if clusters.dim() != 1 or clusters.shape != labels.shape or not len(labels):
        raise InvalidData(
            f"clusters and labels have shapes {tuple(clusters.shape)} and {tuple(labels.shape)}; "
            "expected (N,) both. Pass gmvae.cluster(x) and the class indices of the same rows."
        )
    if min(clusters.min(), labels.min()) < 0:
        raise InvalidData(
            "clusters or labels hold negative entries; expected integers from 0. Drop unlabelled rows."
        )
    counts = torch.zeros(int(clusters.max()) + 1, int(labels.max()) + 1, dtype=torch.long)
    counts.index_put_((clusters.long(), labels.long()), torch.ones_like(labels.long()), accumulate=True)
    rows, columns = linear_sum_assignment(counts.numpy(), maximize=True)
    matching = {int(row): int(column) for row, column in zip(rows, columns, strict=True)}
    return counts[rows, columns].sum().item() / len(labels), matching
