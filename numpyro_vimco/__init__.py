# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""VIMCO-⋆ and its relatives for NumPyro: stochastic variational inference where latents cannot be reparameterised."""

from numpyro_vimco.guides import AutoDiscrete, AutoMixed
from numpyro_vimco.objectives import REINFORCE, VIMCO, ImportanceWeightedELBO, ReweightedWakeSleep, VIMCOStar
from numpyro_vimco.posterior import compare_objectives, fit, gradient_snr, importance_diagnostics, plots, to_arviz

__version__ = "0.1.0"

__all__ = [
    "REINFORCE",
    "VIMCO",
    "AutoDiscrete",
    "AutoMixed",
    "ImportanceWeightedELBO",
    "ReweightedWakeSleep",
    "VIMCOStar",
    "compare_objectives",
    "fit",
    "gradient_snr",
    "importance_diagnostics",
    "plots",
    "to_arviz",
]
