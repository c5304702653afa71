# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0

from itertools import permutations

import pytest
import torch

from pyro_cpa.errors import InvalidData
from pyro_cpa.models.cluster_accuracy import cluster_accuracy


def test_best_of_all_matchings():
    clusters, labels = torch.randint(4, (60,)), torch.randint(4, (60,))
    best = max((torch.tensor(p)[clusters] == labels).double().mean().item() for p in permutations(range(4)))
    accuracy, matching = cluster_accuracy(clusters, labels)
    assert accuracy == pytest.approx(best)
    matched = torch.tensor([matching[c] for c in clusters.tolist()])
    assert (matched == labels).double().mean().item() == pytest.approx(best)


def test_more_clusters_than_classes():
    accuracy, matching = cluster_accuracy(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 0, 1, 1]))
    assert accuracy == 0.75 and matching[2] == 1 and len(matching) == 2


def test_bad_arguments():
    with pytest.raises(InvalidData, match=r"shapes \(3,\) and \(2,\)"):
        cluster_accuracy(torch.zeros(3), torch.zeros(2))
    with pytest.raises(InvalidData, match="Drop unlabelled rows"):
        cluster_accuracy(torch.tensor([0, 1]), torch.tensor([0, -1]))
