# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""After a fit: the posterior, and whether to trust it.

In: an ``SVI`` and its arguments, or its fitted parameters. Out: fits, weighted draws, diagnostics, ArviZ objects,
pictures. Open `fit` for several fits side by side (`starts`: where they begin, `steps`: how they go, `annealing`: the
power of the likelihood), `inference_data` for `to_arviz`, `diagnostics` for whether a fit can be trusted and its
gradient was good enough, `proposals` for draws with their importance weights, `fitted` for how parameters and arguments
are checked, and `plots` for the pictures.
"""

from numpyro_vimco.posterior import plots
from numpyro_vimco.posterior.diagnostics import compare_objectives, gradient_snr, importance_diagnostics
from numpyro_vimco.posterior.fit import fit
from numpyro_vimco.posterior.inference_data import to_arviz

__all__ = ["compare_objectives", "fit", "gradient_snr", "importance_diagnostics", "plots", "to_arviz"]
