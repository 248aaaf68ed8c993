# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Objectives: the classes that :class:`numpyro.infer.SVI` is given.

In: a model, a guide, their parameters and a key. Out: an importance-weighted bound with its gradient attached. Open
`elbo` for the classes and their options, `control_variates` for the estimators (pure functions of log-weights),
`gradients` for which derivative takes which weight, `program` for how model and guide are traced, `densities`, `plates`
and `levels` for how densities are summed, `enumeration` for sites that are summed out, `zero_weights` for derivatives
at density zero, `elements`, `checks` and `enumeration_checks` for programs and arguments that are refused. Estimators
know no sites, and the modules of sites know no estimator.
"""

from numpyro_vimco.objectives.elbo import REINFORCE, VIMCO, ImportanceWeightedELBO, ReweightedWakeSleep, VIMCOStar

__all__ = ["REINFORCE", "VIMCO", "ImportanceWeightedELBO", "ReweightedWakeSleep", "VIMCOStar"]
