# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""After a fit: the posterior, and whether to trust it.

In: an ``SVI`` and its fitted parameters. Out: weighted draws, diagnostics, ArviZ objects, pictures.
Open `inference_data` for `to_arviz`, `elements` for its log-likelihoods of plates with latents, `diagnostics` for
whether a fit can be trusted, `advice` for what to do if not, `gradient_noise` for whether its gradient was good enough,
`plots` for the pictures, `proposals` for draws with their importance weights, `weights` for what these weights say,
`chunks` for how draws are computed, `fitted` for how a fit is checked, and `observed` for data that are missing.
"""

from numpyro_vimco.posterior import plots
from numpyro_vimco.posterior.diagnostics import importance_diagnostics
from numpyro_vimco.posterior.gradient_noise import compare_objectives, gradient_snr
from numpyro_vimco.posterior.inference_data import to_arviz

__all__ = ["compare_objectives", "gradient_snr", "importance_diagnostics", "plots", "to_arviz"]
