# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""After a fit: the posterior, and whether to trust it.

In: an ``SVI`` and its arguments, or its fitted parameters. Out: fits, weighted draws, diagnostics, ArviZ objects,
pictures.

- `fit`: several fits side by side (`starts`: where they begin, `steps`: how they go, `annealing`: the power of the
  likelihood, `renewing`: their units, `recovery`: what all had lost), and draws from all of their guides (`pooling`,
  `defence`).
- `inference_data`: `to_arviz` (`log_likelihoods`: of plates with latents).
- `diagnostics`: whether a fit can be trusted (`agreement`: do its starts agree, `past`: what its losses prove,
  `exchange`: do its draws have both orders of two elements, `advice`: what to do if not); `gradient_noise`: was its
  gradient good enough; `plots`: the pictures.
- `proposals`: draws with their importance weights (`weighing`, `weights`, `moments`: what they say, `chunks`: how many
  draws are computed at a time).
- `results`: what a fit leaves behind; `fitted`: how parameters, arguments and data are checked (`observed`: data that
  are missing).
"""

from numpyro_vimco.posterior import plots
from numpyro_vimco.posterior.diagnostics import importance_diagnostics
from numpyro_vimco.posterior.fit import fit
from numpyro_vimco.posterior.gradient_noise import compare_objectives, gradient_snr
from numpyro_vimco.posterior.inference_data import to_arviz

__all__ = ["compare_objectives", "fit", "gradient_snr", "importance_diagnostics", "plots", "to_arviz"]
