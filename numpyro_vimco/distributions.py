# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Integer distributions for guides, under their public name: :mod:`numpyro_vimco.families.distributions`."""

from numpyro_vimco.families.distributions import DiscretizedLogistic, IntervalCategorical

__all__ = ["DiscretizedLogistic", "IntervalCategorical"]
