# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""How a fit goes: several starts side by side.

`run` is the whole, `starts` where they begin, `steps` how they go, `tempering` the inverse temperature of the
likelihood, `renewing` the units of steps, `breakdowns` why they broke down, `recovery` what all starts had
lost, `state` what is left behind.
"""
