"""Who is measured: from a problem, a seed and a budget in seconds to rows of `results.COLUMNS`."""

from functools import partial
from typing import NamedTuple

import jax
from jax import random
import numpy as np
from numpyro.infer import MCMC, SVI
import optax

from benchmarks.common import elbo
from benchmarks.posteriors import recommended as learning_rate
from benchmarks.posteriors.grid import elbos, grid
from benchmarks.posteriors.markov_chains import discrete_hmc_gibbs, enumerated_nuts, ess_and_rhat, mixed_hmc
from benchmarks.posteriors.measuring import Clock, Quantities, forget_compiled, mean_asked
from benchmarks.posteriors.pymc_steps import compound_step
from numpyro_vimco import AutoMixed, GuidedMCMC, VIMCOStar, fit

PARTICLES, PROPOSALS, MOST_STEPS = 64, 40_000, 50_000
LOCAL_PARTICLES = 8  # and as many global ones


class Run(NamedTuple):
    """What a run of so many steps took, in seconds.

    :ivar of_fit: of `fit`, without compilation.
    :ivar after: of what comes after it, without compilation.
    :ivar compiling: of all compilation.
    """

    num_steps: int
    of_fit: float
    after: float
    compiling: float


def recommended(about, seed, budget, form="all sampled"):
    """The line that this library recommends: runs of 500 and 2,000 steps, and longer ones until one is called "good".

    A run is what a user writes: `fit`, then `diagnose` and `to_arviz`, each of which compiles. The third is
    planned, from the time of the shorter ones, to fill the budget with compilation counted, and the fourth to fill it
    without; not where the one before did so to more than 60 %, and to four times its steps at most. Plans leave a
    quarter, as steps took up to 1.6 times as long in long runs.

    :param form: whether latents of few states are marked, to be ``"summed out"``, or a plate has ``"local particles"``.
    """
    model = about.enumerated if form == "summed out" else about.model
    if model is None or (form == "local particles" and about.plate is None):
        return
    objective = VIMCOStar(0.5, PARTICLES)
    if form == "local particles":
        objective = VIMCOStar(0.5, LOCAL_PARTICLES, plate_particles={about.plate: LOCAL_PARTICLES})
    name = f"recommended, {form}"
    quantities, proposals, runs = Quantities(about), PROPOSALS, []
    for num_steps in (500, 2000):
        if runs and num_steps > steps_within(runs, budget):
            break
        row, run = recommended_run(name, model, objective, about, quantities, seed, num_steps, proposals)
        yield row
        runs.append(run)
        if run.after > budget / 4:
            proposals = PROPOSALS // 4
    for compiling in (runs[-1].compiling, 0):
        spent = runs[-1].of_fit + runs[-1].after + compiling
        num_steps = min(steps_within(runs, 0.75 * budget - compiling), 4 * runs[-1].num_steps)
        if row["verdict"] != "good" and num_steps > runs[-1].num_steps and not 0.6 * budget < spent <= budget:
            row, run = recommended_run(name, model, objective, about, quantities, seed, num_steps, proposals)
            yield row
            runs.append(run)


def recommended_run(name, model, objective, about, quantities, seed, num_steps, proposals):
    """A row and a `Run`."""
    svi = SVI(model, AutoMixed(model, **about.guide_options), optax.adam(learning_rate(num_steps)), objective)
    fit_key, weight_key, draw_key = random.split(random.key(seed), 3)
    forget_compiled()
    clock, of_fit = Clock(), Clock()
    with clock:
        with of_fit:
            posterior = fit(svi, fit_key, num_steps, *about.args, progress_bar=False)
        found = posterior.diagnose(proposals, weight_key)
        draws = posterior.to_arviz(rng_key=draw_key, num_samples=proposals // 4, num_proposals=proposals, groups=())
        estimate = mean_asked(quantities, {name: x.values[0] for name, x in draws["posterior"].data_vars.items()})
    ess = float(np.min(found.ess))
    row = {
        "method": name, "seed": seed, "size": num_steps, **clock.columns(), **quantities.error(estimate),
        **quantities.of_evidence(found.log_evidence, elbo(posterior, proposals)), "relative_ess": ess / proposals,
        "ess_per_second": ess / clock.seconds, "pareto_k": float(np.max(found.pareto_k)), "verdict": found.verdict,
    }  # fmt: skip
    return row, Run(num_steps, of_fit.seconds, clock.seconds - of_fit.seconds, clock.compiling)


def flat(posterior):
    """Draws of all chains of a group of ArviZ, one after the other, by site."""
    return {name: x.values.reshape(-1, *x.shape[2:]) for name, x in posterior.data_vars.items()}


def planned(about, seed, budget, num_steps=2000, improves=False):
    """`fit(model, ...)` as it is; and where ``improves``, a second row after `improve` for the rest of the budget.

    A verdict of chains says nothing of the evidence, which stays that of the weights with their own verdict: the second
    row is then without it.
    """
    quantities = Quantities(about)
    fit_key, key = random.split(random.key(seed))
    forget_compiled()
    clock = Clock()

    def row(method, posterior):
        with clock:
            draws = posterior.to_arviz(num_samples=4000, num_proposals=16_000, groups=())["posterior"]
            estimate = mean_asked(quantities, flat(draws))
        diagnostics = posterior.diagnostics
        ess = float(np.min(diagnostics.ess)) / diagnostics.num_draws
        evidence = quantities.of_evidence(diagnostics.log_evidence) if posterior.mcmc is None else {}
        return {
            "method": method, "seed": seed, "size": num_steps, **clock.columns(),
            **quantities.error(estimate), **evidence, "relative_ess": ess,
            "pareto_k": float(np.max(diagnostics.pareto_k)), "verdict": posterior.verdict,
            "note": "; ".join(posterior.improvements) or posterior.plan.what,
        }  # fmt: skip

    with clock:
        posterior = fit(about.model, fit_key, num_steps, *about.args, progress_bar=False)
        verdict = posterior.verdict
    yield row("planned", posterior)
    if improves:
        if verdict != "good" and clock.total < budget:
            with clock:
                posterior = posterior.improve(key, budget - clock.total)
        yield row("planned, improved", posterior)


def refined(about, seed, budget, num_steps=2000):
    """`fit(model, ...)` and `refine`, as they are by default, and the two parts of it alone: three rows.

    The parts are the weighted draws of the fit, and the inner kernel from the same places, with as many steps. The time
    of the fit is not counted for the kernel, which could begin elsewhere. The ESS of chains is here the worst of a
    latent that is sampled. The budget is not used.
    """
    quantities = Quantities(about)
    fit_key, chain_key, inner_key = random.split(random.key(seed), 3)
    forget_compiled()
    clock, of_inner = Clock(), Clock()

    def row(method, clock, mcmc):
        samples = mcmc.get_samples(group_by_chain=True).values()
        elements = [np.asarray(x, float).reshape(*x.shape[:2], -1) for x in samples]
        ess, rhat, _ = ess_and_rhat(np.concatenate(elements, axis=-1))
        number = mcmc.num_chains * mcmc.num_samples
        return {
            "method": method, "seed": seed, "size": number, **clock.columns(), "relative_ess": ess / number,
            "ess_per_second": ess / clock.seconds, "rhat": rhat,
        }  # fmt: skip

    with clock:
        posterior = fit(about.model, fit_key, num_steps, *about.args, progress_bar=False)
        diagnostics = posterior.diagnostics
    ess = float(np.min(diagnostics.ess))
    yield {
        "method": "refined: weights alone", "seed": seed, "size": diagnostics.num_draws, **clock.columns(),
        "relative_ess": ess / diagnostics.num_draws, "ess_per_second": ess / clock.seconds,
        "pareto_k": float(np.max(diagnostics.pareto_k)), "note": f'says "{posterior.verdict}"',
    }  # fmt: skip
    with clock:
        mcmc = posterior.refine(chain_key, progress_bar=False)
        found = posterior.diagnose_chains(mcmc)
        estimate = mean_asked(quantities, flat(posterior.to_arviz(mcmc, groups=())["posterior"]))
    note = f"{found.moved:.0%} of the global steps moved"
    yield {**row("refined", clock, mcmc), **quantities.error(estimate), "verdict": found.verdict, "note": note}
    kernel = GuidedMCMC(posterior)
    begin = kernel.prepare(inner_key, mcmc.num_chains, 1)
    forget_compiled()
    with of_inner:
        alone = MCMC(
            kernel.inner_kernel, num_warmup=mcmc.num_warmup, num_samples=mcmc.num_samples, num_chains=mcmc.num_chains,
            chain_method=jax.vmap, progress_bar=False,
        )  # fmt: skip
        alone.run(random.fold_in(inner_key, 1), *about.args, init_params=begin)
    yield row("refined: inner kernel alone", of_inner, alone)


def steps_within(runs, seconds):
    """The largest number of steps that is expected to end within so many seconds, without compilation; rounded down."""
    last = runs[-1]
    each = last.of_fit / last.num_steps
    if last.num_steps > runs[0].num_steps and last.of_fit > runs[0].of_fit:
        each = (last.of_fit - runs[0].of_fit) / (last.num_steps - runs[0].num_steps)
    num_steps = last.num_steps + (seconds - last.of_fit - last.after) / each
    return int(min(num_steps // 500 * 500 if num_steps > 2000 else num_steps // 100 * 100, MOST_STEPS))


METHODS = {
    "recommended": recommended,
    "summed_out": partial(recommended, form="summed out"),
    "local_particles": partial(recommended, form="local particles"),
    "grid": partial(grid, num_particles=PARTICLES),
    "ELBOs": partial(elbos, num_particles=PARTICLES),
    "DiscreteHMCGibbs": discrete_hmc_gibbs,
    "MixedHMC": mixed_hmc,
    "NUTS": enumerated_nuts,
    "PyMC": compound_step,
    "refined": refined,
    "planned": planned,
    "improved": partial(planned, improves=True),
}
