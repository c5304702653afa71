# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""``python -m pyro_cpa.demo``."""

from __future__ import annotations

import sys

from .command import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
