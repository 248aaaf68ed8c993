# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Log-densities of a model and its guide.

In: both, their arguments, and values of latents. Out: log p and log q, by level. Open `program` for how they are
traced, `densities` for the sites of one draw, `plates`, `levels` and `chains` for how densities are summed,
`enumeration` and `enumerated_model` for sites that are summed out, `tempered` for inverse temperatures, `zero_weights`
for derivatives where a density is zero. No estimator is known here.
"""
