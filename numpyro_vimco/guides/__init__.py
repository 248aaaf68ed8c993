# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Automatic guides.

In: a model. Out: a guide with parameters for all of its latents, or for the discrete ones; no estimator is known here.
Open `auto_mixed` for the guide of all latents, `auto_discrete` for that of discrete ones, `conditional_normal` for
continuous latents given discrete ones, `families` for which distribution a support gets and where it begins,
`distributions` for the integer distributions themselves, `point_masses` for priors that are refused, `structural` for
what the guides have in common, and `private` for what they use of NumPyro's own.
"""

from numpyro_vimco.guides.auto_discrete import AutoDiscrete
from numpyro_vimco.guides.auto_mixed import AutoMixed

__all__ = ["AutoDiscrete", "AutoMixed"]
