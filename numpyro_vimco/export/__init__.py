# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""What leaves the library: draws of the posterior with what follows from them.

`posterior_draws` are resampled draws (`summed`: of sites that are summed out), `inference_data` lays them out for ArviZ
(`log_likelihoods`: of plates with latents), `predictions` are those for other arguments of the model.
"""
