# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Programs that are refused: is a model with its guide what an importance weight supposes?

`supports_and_plates` compares the two traces, `independence` finds out whether elements of plates are independent,
`guide_densities` whether sites of the guide have a density, `enumeration_checks` whether sites can be summed out,
`jumps` where a density jumps.
"""
