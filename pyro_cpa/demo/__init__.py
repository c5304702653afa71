# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The demonstration behind ``make demo``: a real table of data fitted exactly and by a VAE, side by side.

Run it with ``python -m pyro_cpa.demo``; ``--help`` lists its options.
"""

from .command import main

__all__ = ["main"]
