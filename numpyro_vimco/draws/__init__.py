# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Weighted draws: from fitted guides, with the densities that importance weights need.

`approximation` is a model and a guide with fitted parameters (`observed`: which data are missing), `proposals` draws
from its guides, `pooling` from the mixture of all, `defence` adds latents from the model, `chunks` computes many draws,
`weighing` keeps what they say (`weights`, `moments`).
"""
