# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Objectives: the classes that :class:`numpyro.infer.SVI` is given.

In: a model, a guide, their parameters and a key. Out: an importance-weighted bound with its gradient attached. Open
`elbo` for the classes and their options, `control_variates` for the estimators (pure functions of log-weights),
`paths` for the weights of paths through the samples of chains, `gradients` for which derivative takes which weight, and
`elements` for values that would make weights wrong, `jumping` for latents at which the density jumps.
"""

from numpyro_vimco.objectives.elbo import REINFORCE, VIMCO, ImportanceWeightedELBO, ReweightedWakeSleep, VIMCOStar

__all__ = ["REINFORCE", "VIMCO", "ImportanceWeightedELBO", "ReweightedWakeSleep", "VIMCOStar"]
