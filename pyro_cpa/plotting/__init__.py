# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Pictures of partitions, posteriors, latent spaces and fits.

Every function draws on ``ax=`` (on axes of a new figure without it) and returns the axes; none opens a
window or chooses a matplotlib backend: ``plot_partition(part).figure.savefig("partition.png")``.
"""

from .curves import plot_comparison, plot_evidence, plot_integrand
from .latent import plot_generated, plot_latent_map
from .partition import plot_partition
from .posterior import plot_posterior

__all__ = [
    "plot_comparison",
    "plot_evidence",
    "plot_generated",
    "plot_integrand",
    "plot_latent_map",
    "plot_partition",
    "plot_posterior",
]
