# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""How a model is fitted, where the user does not say.

In: a model and its arguments. Out: plans, the best first, each of which makes the `SVI` of a fit. Open `structure` for
what is found out about a model, `rules` for what follows from it, and `plan` for a plan as it is printed and run.
"""
