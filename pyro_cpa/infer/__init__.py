# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0

from pyro_cpa.infer.analytic import AnalyticELBO

__all__ = ["AnalyticELBO"]
