# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""VIMCO-⋆ and its relatives for NumPyro: stochastic variational inference where latents cannot be reparameterised."""

import os
import warnings

import jaxlib.version

from numpyro_vimco.control_flow import sum_out
from numpyro_vimco.guides import AutoDiscrete, AutoMixed
from numpyro_vimco.mcmc import GuidedMCMC
from numpyro_vimco.objectives import REINFORCE, VIMCO, ImportanceWeightedELBO, ReweightedWakeSleep, VIMCOStar
from numpyro_vimco.posterior import Posterior, fit, plots

__version__ = "0.3.0"

__all__ = [
    "REINFORCE",
    "VIMCO",
    "AutoDiscrete",
    "AutoMixed",
    "GuidedMCMC",
    "ImportanceWeightedELBO",
    "Posterior",
    "ReweightedWakeSleep",
    "VIMCOStar",
    "fit",
    "plots",
    "sum_out",
]

if jaxlib.version.__version__ == "0.10.2" and "xla_cpu_experimental_ynn_fusion_type" not in os.getenv("XLA_FLAGS", ""):
    warnings.warn(
        "jaxlib 0.10.2 computes wrong sums of large arrays on CPUs, without a word "
        "(https://github.com/jax-ml/jax/issues/39103), and so wrong densities of many particles, of any NumPyro model. "
        "Install another version: `pip install 'jaxlib!=0.10.2' 'jax!=0.10.2'`; or set "
        "XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= before Python starts.",
        stacklevel=2,
    )
