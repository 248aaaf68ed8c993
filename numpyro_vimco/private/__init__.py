# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""All that this package uses of NumPyro, JAX and funsor beyond their public interfaces, a module for each.

Each has ``PARTS``, the names of these; a test looks whether they are there.
"""
