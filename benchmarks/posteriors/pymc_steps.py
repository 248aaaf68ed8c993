"""PyMC's compound step: NUTS for continuous latents, and its own steps for discrete ones."""

from time import process_time

import numpy as np

from benchmarks.posteriors.markov_chains import MARKS, MOST_KEPT, WARMUP, of_draws
from benchmarks.posteriors.measuring import Mapped, Quantities

CHAINS, MOST_DRAWS = 2, 200_000


def compound_step(about, seed, budget):
    """Rows over time from two chains, one after the other with half of the budget each.

    Time at which both have come to a draw: twice that of a chain. What comes before the first step of the first chain
    counts as compilation.
    """
    try:
        import pymc
    except ImportError:
        yield {"method": "PyMC", "seed": seed, "note": "PyMC is not installed: pip install '.[pymc]'"}
        return
    if about.pymc_model is None:
        yield {"method": "PyMC", "seed": seed, "note": "no form of the model for PyMC"}
        return
    model = about.pymc_model(*about.args)
    pilot = Chain(pymc, model, seed, WARMUP, budget / 20)
    speed = len(pilot.times) / max(pilot.times[-1], 1e-6)
    num_warmup = int(np.clip(speed * budget / CHAINS / 3, 20, WARMUP))
    chains = [Chain(pymc, model, CHAINS * seed + i, num_warmup, budget / CHAINS) for i in range(CHAINS)]
    quantities = Quantities(about)
    asked = [Mapped(quantities.of, 1000)(chain.draws) for chain in chains if len(chain.draw_times)]
    if len(asked) < CHAINS:
        yield {"method": "PyMC", "seed": seed, "note": f"in {budget:.0f} s it did not come to an end of its warm-up"}
        return
    for mark in MARKS * budget:
        number = min(np.searchsorted(chain.draw_times, mark / CHAINS) for chain in chains)
        if number:
            yield row_at(quantities, np.stack([x[:number] for x in asked]), mark, pilot.compiling, seed)


def row_at(quantities, draws, seconds, compiling, seed):
    """The row of a time.

    :param draws: so far, of shape (chains, draws, quantities).
    """
    num_draws = draws.shape[0] * draws.shape[1]
    row = {
        "method": "PyMC", "seed": seed, "size": num_draws, "seconds": float(seconds),
        "seconds_with_compilation": float(seconds + compiling),
    }  # fmt: skip
    return row | of_draws(quantities, draws[:, :: -(-draws.shape[1] // MOST_KEPT)], num_draws, seconds)


class Chain:
    """One chain that ends with the time.

    :ivar compiling: seconds before its first step.
    :ivar times: of all steps, in seconds since the first one.
    :ivar draw_times: of those after the warm-up.
    :ivar draws: by name, of shape (draws, *shape).
    """

    def __init__(self, pymc, model, seed, num_warmup, budget):
        self.times = []
        began = process_time()

        def note(trace, draw):
            self.times.append(process_time())
            if self.times[-1] - self.times[0] > budget:
                raise KeyboardInterrupt  # PyMC then returns the draws that there are

        with model:
            found = pymc.sample(
                MOST_DRAWS, tune=num_warmup, chains=1, cores=1, random_seed=seed, callback=note, progressbar=False,
                compute_convergence_checks=False, discard_tuned_samples=False, return_inferencedata=False,
            )  # fmt: skip
        self.compiling = self.times[0] - began
        self.times = np.array(self.times) - self.times[0]
        self.draw_times = self.times[num_warmup:]
        names = [variable.name for variable in model.unobserved_RVs]
        self.draws = {name: found.get_values(name)[num_warmup : len(self.times)] for name in names}
