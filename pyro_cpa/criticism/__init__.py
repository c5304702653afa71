# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What an exact evidence opens: comparison, anomaly detection, imputation, and a way into ArviZ."""

from pyro_cpa.criticism.arviz import to_arviz

__all__ = ["to_arviz"]
