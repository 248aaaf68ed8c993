"""Models whose discrete latents NumPyro sums out: `TraceEnum_ELBO`, and the discrete latents given the others."""

import jax
from jax import random
import numpy as np
from numpyro import handlers
from numpyro.infer import SVI, Predictive, TraceEnum_ELBO
from numpyro.infer.autoguide import AutoNormal
import optax

from benchmarks.posteriors import recommended as learning_rate
from benchmarks.posteriors.measuring import Clock, Mapped, Quantities, mean_asked
from numpyro_vimco import fit


def discrete_given_others(about, chunk, rng):
    """A function from draws to these with the latents that were summed out, drawn given the others.

    Arrays have a leading axis for the draws.

    :param chunk: for so many draws at a time it is compiled.
    :param rng: of NumPy.
    """

    def discrete(bits, draw):
        if about.given_others is not None:
            return about.given_others(random.key(bits), draw, *about.args)
        single = {name: value[None] for name, value in draw.items()}
        predictive = Predictive(about.enumerated, single, infer_discrete=True, parallel=True)
        found = {name: value[0] for name, value in predictive(random.key(bits), *about.args).items()}
        # Deterministic sites, which `Predictive` leaves out here.
        again = handlers.trace(handlers.substitute(handlers.seed(about.enumerated, 0), data={**draw, **found}))
        sites = again.get_trace(*about.args)
        return found | {name: site["value"] for name, site in sites.items() if site["type"] == "deterministic"}

    mapped = Mapped(discrete, chunk)

    def complete(draws):
        length = len(next(iter(draws.values())))
        return {**draws, **mapped(rng.integers(2**31, size=length, dtype=np.uint32), draws)}

    return complete


def is_enumerated(site):
    """Whether a site is summed out."""
    return site["type"] == "sample" and site["infer"].get("enumerate") == "parallel"


def summed_out(about, num_steps, num_starts, seed, num_draws=4000):
    """Rows of `TraceEnum_ELBO`: a normal guide of what is not summed out, whose draws are taken as they are."""
    guide = AutoNormal(handlers.block(about.enumerated, hide_fn=is_enumerated))
    svi = SVI(about.enumerated, guide, optax.adam(learning_rate(num_steps)), TraceEnum_ELBO(num_particles=8))
    fit_key, *keys = random.split(random.key(seed), 1 + num_starts)
    quantities, clock, estimates = Quantities(about), Clock(), []
    with clock:
        starts = fit(svi, fit_key, num_steps, *about.args, num_starts=num_starts, progress_bar=False).starts
        complete = discrete_given_others(about, 200, np.random.default_rng(seed))
        for start, key in enumerate(keys):
            params = jax.tree.map(lambda leaf, start=start: leaf[start], starts.params)
            draws = guide.sample_posterior(key, params, sample_shape=(num_draws,))
            # Without deterministic sites: those of the discrete latents are of draws of the prior here.
            draws = {name: x for name, x in draws.items() if guide.prototype_trace[name]["type"] == "sample"}
            estimates.append(mean_asked(quantities, complete(jax.device_get(draws))))
    for start, estimate in enumerate(estimates):
        elbo = -starts.losses[start, -num_steps // 20 :].mean()
        yield {
            "method": "TraceEnum_ELBO", "seed": seed + start, "size": num_steps, **clock.columns(),
            **quantities.error(estimate), **quantities.of_evidence(elbo, elbo),
            "ess_per_second": num_draws / clock.seconds,
        }  # fmt: skip
