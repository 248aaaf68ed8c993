# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Automatic guides.

In: a model. Out: a guide with parameters for all of its latents, or for the discrete ones; no estimator is known here.
Open `auto_mixed` for the guide of all latents and the formulas, `auto_discrete` for that of discrete ones, `structured`
for how sites are drawn one after the other, `plan` for the order of sites and their parents, `least` for what the data
say of counts in chains, `structural` for the guides' common base class, `point_masses` for priors that are refused,
`options` for checks of arguments, `automatic` for how automatic guides are found in a guide by hand, and `private` for
the private parts of NumPyro's guides.
"""

from numpyro_vimco.guides.auto_discrete import AutoDiscrete
from numpyro_vimco.guides.auto_mixed import AutoMixed

__all__ = ["AutoDiscrete", "AutoMixed"]
