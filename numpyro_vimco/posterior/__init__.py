# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""What a user holds after a fit.

`posterior` is the object, `tables` how it is printed, `plots` its pictures. `chains` has what is said of chains, and
`improving` what is done about a posterior that is not good.
"""

from numpyro_vimco.posterior import plots
from numpyro_vimco.posterior.posterior import Posterior, fit

__all__ = ["Posterior", "fit", "plots"]
