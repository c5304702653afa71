# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
