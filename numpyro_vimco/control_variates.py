# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

""":mod:`numpyro_vimco.objectives.control_variates`, functions of the log-weights, under its public name."""

from numpyro_vimco.objectives.control_variates import *  # noqa: F403
from numpyro_vimco.objectives.control_variates import __all__ as __all__
