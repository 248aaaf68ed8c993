# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""How a model is fitted, where the user does not say.

In: a model and its arguments. Out: plans, the best first, each of which makes the `SVI` of a fit. `structure` inspects
a model, `rules` chooses plans, and `plan` prints and runs one.
"""
