"""Variable selection: 16 simulated predictors, neighbours correlated 0.97, 600 cases, of which four count.

Truth: exact, by the sum over 65,536 models.
"""

from functools import partial

from benchmarks.posteriors import correlated_design
from benchmarks.posteriors.diabetes import model, pymc_model, truth

__all__ = ["data", "model", "pymc_model", "truth"]

data = partial(correlated_design.data, correlation=0.97, num_cases=600, effect=0.8)
