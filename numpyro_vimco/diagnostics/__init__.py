# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Whether to trust a fitted posterior.

`verdict` says "good", "usable" or "bad"; `findings` why, and what to do. `agreement` compares starts, `earlier_bounds`
says what losses prove, `label_switching` looks for orders that were lost, `gradient_noise` at the gradient.
"""
