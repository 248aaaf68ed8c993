# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""The distributions of one latent in a guide, and where it begins.

`families` chooses one for a support, `distributions` has those of integers, `components` mixtures, `autoregressive`
those whose elements are coupled, `bounds` supports that depend on other latents, `couplings` finds which latents the
model couples, `units` the units of locations, `supports` refuses priors that cannot be followed.
"""
