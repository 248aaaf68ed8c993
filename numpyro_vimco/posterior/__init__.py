# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""After a fit: the posterior, and whether to trust it.

In: an ``SVI`` and its fitted parameters. Out: weighted draws, diagnostics, ArviZ objects, pictures.
Open `inference_data` for `to_arviz`, `diagnostics` for whether a fit can be trusted and its gradient was good enough,
`proposals` for draws with their importance weights, `fitted` for how parameters and arguments are checked, and `plots`
for the pictures.
"""

from numpyro_vimco.posterior import plots
from numpyro_vimco.posterior.diagnostics import compare_objectives, gradient_snr, importance_diagnostics
from numpyro_vimco.posterior.inference_data import to_arviz

__all__ = ["compare_objectives", "gradient_snr", "importance_diagnostics", "plots", "to_arviz"]
