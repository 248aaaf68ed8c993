# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""MCMC that a fit guides: where importance weights do not suffice.

`kernel` is a kernel of NumPyro with steps of another one, `inner`, and global steps between them.
"""

from numpyro_vimco.mcmc.kernel import GuidedMCMC

__all__ = ["GuidedMCMC"]
