"""Samplers of NumPyro: rows over time from one run of two chains."""

import arviz as az
from jax import random
import numpy as np
from numpyro.infer import HMC, NUTS, DiscreteHMCGibbs, MixedHMC

from benchmarks.posteriors.chains import CHAINS, KEPT, Chains
from benchmarks.posteriors.measuring import Clock, Mapped, Quantities, forget_compiled
from benchmarks.posteriors.summed_out import discrete_given_others

# At which times there is a row, as shares of the budget.
MARKS = np.array([1 / 30, 1 / 12, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1])
# NumPyro's examples take so many steps to adapt; fewer where that is more than a third of the budget.
WARMUP = 1000
# At most so many draws of each chain are kept, evenly.
MOST_KEPT = 20_000
# Functions of draws are compiled for so many at a time.
CHUNK = 50


def discrete_hmc_gibbs(about, seed, budget):
    """Gibbs steps for discrete latents, which always propose another value, and NUTS for the others."""
    return of_kernel(
        "DiscreteHMCGibbs", lambda: DiscreteHMCGibbs(NUTS(about.model), modified=True), about, seed, budget
    )


def mixed_hmc(about, seed, budget):
    """HMC whose trajectories are interrupted by discrete steps."""
    return of_kernel("MixedHMC", lambda: MixedHMC(HMC(about.model), modified=True), about, seed, budget)


def enumerated_nuts(about, seed, budget):
    """NUTS with the discrete latents summed out; they are drawn given the others afterwards."""
    if about.enumerated is None:
        yield {"method": "NUTS", "seed": seed, "note": "no form of the model whose discrete latents NumPyro sums out"}
        return
    complete = discrete_given_others(about, CHUNK, np.random.default_rng(seed))
    yield from of_kernel("NUTS", lambda: NUTS(about.enumerated), about, seed, budget, complete)


def of_kernel(name, kernel, about, seed, budget, complete=lambda draws: draws):
    """Rows of a kernel at `MARKS` of the budget, which counts its time without compilation.

    :param kernel: makes it.
    :param complete: from draws to draws with further latents.
    """
    forget_compiled()
    quantities = Quantities(about)
    chains, clock = warmed_up(kernel, about, random.key(seed), budget)
    asked = Mapped(quantities.of, CHUNK)
    marks, kept, size = list(MARKS * budget), [], 1
    while marks:
        before = clock.seconds
        with clock:
            draws = {site: x.reshape(-1, *x.shape[2:]) for site, x in chains.advance(size).items()}
            kept.append(asked(complete(draws)).reshape(size, CHAINS, -1))
        if clock.seconds >= marks[0]:
            marks = [mark for mark in marks if mark > clock.seconds]
            num_draws = sum(map(len, kept)) * CHAINS * chains.every
            row = {"method": name, "seed": seed, "size": num_draws, **clock.columns()}
            yield row | of_draws(quantities, np.concatenate(kept).swapaxes(0, 1), num_draws, clock.seconds)
        # Blocks of about a two-hundredth of the budget, so that a row is hardly late.
        faster = budget / 200 / max(clock.seconds - before, 1e-6)
        size = int(np.clip(size * min(faster, 2), 1, KEPT))


def of_draws(quantities, draws, num_draws, seconds):
    """Error, R-hat and bulk ESS of the draws of all chains, as columns of a row.

    :param draws: those kept, of shape (chains, draws, quantities).
    :param num_draws: of all chains, also those not kept.
    """
    ess, rhat, all_move = ess_and_rhat(draws[..., quantities.known])
    return {
        **quantities.error(draws.astype(float).mean((0, 1))), "relative_ess": ess / num_draws,
        "ess_per_second": ess / seconds, "rhat": rhat,
        "verdict": "good" if rhat < 1.01 and ess > 400 and all_move else "bad",
    }  # fmt: skip


def ess_and_rhat(draws):
    """The least bulk ESS and the largest R-hat of elements that move, NaN where there are none; and whether all move.

    Of what is the same in all draws, and of less than four of them, ArviZ knows nothing, and nobody calls it good.

    :param draws: of shape (chains, draws, elements).
    """
    moving = [x for x in np.moveaxis(draws, -1, 0) if draws.shape[1] >= 4 and x.std() > 0]
    with np.errstate(all="ignore"):
        ess, rhat = [az.ess(x, method="bulk") for x in moving], [az.rhat(x) for x in moving]
    ess, rhat = (
        float(worst(x)) if np.isfinite(x).any() else np.nan for worst, x in ((np.nanmin, ess), (np.nanmax, rhat))
    )
    return ess, rhat, len(moving) == draws.shape[-1]


def warmed_up(kernel, about, rng_key, budget):
    """Chains after their warm-up, and a clock that has counted it.

    Where a sixth of the budget is not enough for half of `WARMUP`, chains begin anew with as many steps as a third of
    it has room for, and so does the clock.
    """
    num_warmup = WARMUP
    while True:
        clock, taken, size = Clock(), 0, 1
        with clock:
            chains = Chains(kernel(), about.args, num_warmup, rng_key)
        while taken < num_warmup:
            before = clock.seconds
            with clock:
                chains.warm_up(size)
            taken += size
            speed = size / max(clock.seconds - before, 1e-6)
            if clock.seconds > budget / 6 and taken < num_warmup / 2 and num_warmup == WARMUP:
                break
            size = int(np.clip(speed * budget / 30, 1, min(2 * size, num_warmup - taken) or 1))
        else:
            chains.every = max(int(speed * (budget - clock.seconds) / MOST_KEPT), 1)
            return chains, clock
        num_warmup = max(2 * taken, 20)
