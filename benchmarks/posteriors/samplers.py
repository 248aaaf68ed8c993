"""Two samplers for truths that no sum reaches: NumPyro's NUTS, and tempered sequential Monte Carlo.

Both sample a *summed* model: its latents are continuous, and its discrete latents are summed out by hand in a
`numpyro.factor`. Both run in double precision. They share no code but the model; the first starts near the mode and
stays there, the second comes down from the prior. Both give the log evidence.
"""

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import jax
from jax import random
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import biject_to
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import MCMC, NUTS, init_to_median
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from benchmarks.posteriors import Truth, agreed, of_chains


def two_samplers(summed, draw_latents, asked, args, num_draws=2000, num_particles=500, num_runs=8):
    """The truth, by both samplers.

    :param draw_latents: from a key, continuous latents and ``args`` to discrete latents, a dict, drawn given the
        continuous ones and the data.
    :param asked: as in a problem's module.
    """

    def quantities(key, latents):
        one = lambda key, draw: asked({**draw, **draw_latents(key, draw, *args)}, *args)  # noqa: E731
        shape = jax.tree.leaves(latents)[0].shape[:2]
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), latents)
        found = jax.lax.map(lambda pair: one(*pair), (random.split(key, shape[0] * shape[1]), flat), batch_size=500)
        return {name: np.asarray(x).reshape(*shape, *x.shape[1:]) for name, x in found.items()}

    with jax.enable_x64(True):
        draws = nuts(summed, args, num_draws)
        runs, log_evidences = smc(summed, args, num_particles, num_runs)
        bridged = average_evidence(bridge_sampling(summed, args, draws))
        chains, found = quantities(random.key(1), draws), quantities(random.key(2), runs)
    tempered = average_evidence(log_evidences)
    if abs(tempered[0] - bridged[0]) > 4.5 * np.hypot(tempered[1], bridged[1]) + 0.01:
        raise ValueError(f"log evidence {bridged} by bridge sampling, and {tempered} by sequential Monte Carlo")
    one = of_chains(chains, f"NUTS and bridge sampling, 8 chains of {num_draws}", *bridged)
    other = of_runs(found, f"sequential Monte Carlo, {num_runs} runs of {num_particles}", *tempered)
    return precise(agreed(one, other))


def precise(truth, most=0.03):
    """A truth, or an error if a standard error is large: then samplers agree on nothing, or are stuck in modes."""
    for name, error in truth.errors.items():
        if (error > most * truth.sds[name]).any():
            raise ValueError(f"standard errors of {name} are {error / truth.sds[name]} posterior standard deviations")
    return truth


def nuts(model, args, num_draws):
    """Draws of latents, by name, of shape (chains, draws, *shape); call it in double precision."""
    kernel = NUTS(model, dense_mass=True, target_accept_prob=0.9, init_strategy=init_to_median)
    mcmc = MCMC(
        kernel, num_warmup=1000, num_samples=num_draws, num_chains=8, chain_method="vectorized",
        progress_bar=False, jit_model_args=True,
    )  # fmt: skip
    mcmc.run(random.key(0), *args)
    return mcmc.get_samples(group_by_chain=True)


def of_runs(draws, source, log_evidence=None, log_evidence_error=0.0):
    """Truth of independent runs of equally weighted draws: standard errors from the runs' means.

    :param draws: by quantity, of shape (runs, draws, *shape).
    """
    means, sds = ({name: getattr(x, what)((0, 1)) for name, x in draws.items()} for what in ("mean", "std"))
    errors = {name: x.mean(1).std(0, ddof=1) / len(x) ** 0.5 for name, x in draws.items()}
    return Truth(means, sds, errors, log_evidence, log_evidence_error, source)


def average_evidence(log_evidences):
    """Logarithm of the average of independent, unbiased estimates, and its standard error."""
    log_average = logsumexp(log_evidences) - np.log(len(log_evidences))
    ratios = np.exp(log_evidences - log_average)
    return float(log_average), float(ratios.std(ddof=1) / len(ratios) ** 0.5)


def nested_sampling(model, dimension, num_live, num_runs):
    """Runs of nested sampling by `dynesty`, two at a time.

    :param model: a function of a module, without arguments, that returns the log likelihood of a vector and the map
        from the unit cube to it.
    :returns: equally weighted vectors, of shape (runs, 10_000, dimension), and log evidences, of shape (runs,).
    """
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        runs = list(pool.map(partial(one_nested_run, model, dimension, num_live), range(num_runs)))
    draws, log_evidences = zip(*runs)
    return np.stack(draws), np.array(log_evidences)


def one_nested_run(model, dimension, num_live, seed):
    """Draws and the log evidence."""
    from dynesty import NestedSampler

    rng = np.random.default_rng(seed)
    sampler = NestedSampler(*model(), dimension, nlive=num_live, sample="rslice", rstate=rng)
    sampler.run_nested(dlogz=0.05, print_progress=False)
    results = sampler.results
    weights = np.exp(results.logwt - results.logz[-1])
    chosen = rng.choice(len(weights), 10_000, p=weights / weights.sum())
    return results.samples[chosen], results.logz[-1]


class Unconstrained:
    """A summed model over one real vector for all its latents.

    :param args: arguments of the shapes that it is given later.
    """

    def __init__(self, model, args):
        self.model = model
        sites = trace(seed(model, random.key(0))).get_trace(*args)
        self.bijections = {
            name: biject_to(site["fn"].support)
            for name, site in sites.items()
            if site["type"] == "sample" and not site["is_observed"]
        }
        self.unravel = ravel_pytree(self._reals(sites))[1]

    def _reals(self, sites):
        return {name: bijection.inv(sites[name]["value"]) for name, bijection in self.bijections.items()}

    def prior(self, key, args):
        """A vector drawn from the prior."""
        return ravel_pytree(self._reals(trace(seed(self.model, key)).get_trace(*args)))[0]

    def latents(self, vector):
        """Its latents, by name."""
        return {name: self.bijections[name](x) for name, x in self.unravel(vector).items()}

    def log_densities(self, vector, args):
        """Prior (of the vector) and likelihood, in nats."""
        reals, values = self.unravel(vector), self.latents(vector)
        sites = trace(substitute(seed(self.model, random.key(0)), data=values)).get_trace(*args)
        log_prior = log_likelihood = 0.0
        for name, site in sites.items():
            if site["type"] != "sample":
                continue
            log_density = jnp.sum(site["fn"].log_prob(site["value"]))
            if name in self.bijections:
                volume = self.bijections[name].log_abs_det_jacobian(reals[name], values[name])
                log_prior += log_density + jnp.sum(volume)
            else:
                log_likelihood += log_density
        return log_prior, log_likelihood


def smc(model, args, num_particles, num_runs, seed=0):
    """Runs of sequential Monte Carlo over powers of the likelihood, each moved by Hamiltonian Monte Carlo.

    The next inverse temperature is that at which half of the particles would be effective. Call it in double precision.

    :returns: latents by name, of shape (runs, particles, *shape), and log evidences, of shape (runs,).
    """
    return SMC(model, args)(args, num_particles, num_runs, seed)


class SMC:
    """What `smc` does, compiled once for arguments of the same shapes."""

    def __init__(self, model, args):
        space = self.space = Unconstrained(model, args)
        each = lambda f: jax.jit(jax.vmap(f, in_axes=(0, None)))  # noqa: E731
        self.prior, self.log_likelihood = each(space.prior), each(lambda x, args: space.log_densities(x, args)[1])
        self.move = jax.jit(partial(_moves, space))

    def __call__(self, args, num_particles, num_runs, seed=0):
        keys = random.split(random.key(seed), num_runs)
        runs = [self.one_run(key, args, num_particles) for key in keys]
        latents = jax.jit(jax.vmap(jax.vmap(self.space.latents)))(jnp.stack([x for x, _ in runs]))
        return latents, np.array([log_evidence for _, log_evidence in runs])

    def one_run(self, key, args, num_particles):
        """Particles, of shape (particles, dimension), and the log evidence."""
        rng = np.random.default_rng(np.asarray(random.key_data(key)))
        key, key_prior = random.split(key)
        particles = self.prior(random.split(key_prior, num_particles), args)
        inverse_temperature, log_evidence, step = 0.0, 0.0, 0.5
        while inverse_temperature < 1:
            log_likelihood = np.nan_to_num(np.asarray(self.log_likelihood(particles, args)), nan=-np.inf)
            rise = _rise(log_likelihood, 1 - inverse_temperature)
            inverse_temperature = min(inverse_temperature + rise, 1.0)
            log_weights = rise * log_likelihood
            log_evidence += logsumexp(log_weights) - np.log(num_particles)
            cumulative = np.exp(log_weights - logsumexp(log_weights)).cumsum()
            chosen = np.searchsorted(cumulative, (rng.random() + np.arange(num_particles)) / num_particles)
            particles = particles[np.minimum(chosen, num_particles - 1)]
            key, key_move = random.split(key)
            particles, accepted = self.move(key_move, particles, args, inverse_temperature, step)
            step *= float(jnp.exp(accepted - 0.8))
        return particles, log_evidence


def _rise(log_likelihood, most, share=0.5):
    """By how much the inverse temperature may rise until only a share of the particles is effective."""

    def effective(rise):
        weights = np.exp(rise * (log_likelihood - log_likelihood.max()))
        return weights.sum() ** 2 / (weights**2).sum()

    if effective(most) > share * len(log_likelihood):
        return most
    low, high = 0.0, most
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if effective(middle) > share * len(log_likelihood) else (low, middle)
    return low


def _moves(space, key, particles, args, inverse_temperature, step, num_moves=8, num_leapfrogs=6):
    """Moves of all particles, with the metric of their covariance; and the share that was accepted."""
    dimension = particles.shape[1]
    covariance = jnp.cov(particles.T).reshape(dimension, dimension)
    root = jnp.linalg.cholesky(covariance + 1e-9 * jnp.diag(jnp.diag(covariance)))

    def log_density(x):
        log_prior, log_likelihood = space.log_densities(x, args)
        return log_prior + inverse_temperature * log_likelihood

    def one_move(key, x):
        key_momentum, key_step, key_accept = random.split(key, 3)
        momentum = random.normal(key_momentum, (dimension,))
        size = step * random.uniform(key_step, minval=0.5, maxval=1.5)
        gradient = lambda x: root.T @ jax.grad(log_density)(x)  # noqa: E731

        def leapfrog(state, _):
            x, p, g = state
            p = p + size / 2 * g
            x = x + size * root @ p
            g = gradient(x)
            return (x, p + size / 2 * g, g), None

        (new, end, _), _ = jax.lax.scan(leapfrog, (x, momentum, gradient(x)), length=num_leapfrogs)
        log_ratio = log_density(new) - log_density(x) + (momentum @ momentum - end @ end) / 2
        log_ratio = jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio)
        accept = jnp.log(random.uniform(key_accept)) < log_ratio
        return jnp.where(accept, new, x), jnp.exp(jnp.minimum(log_ratio, 0))

    def sweep(x, key):
        return jax.vmap(one_move)(random.split(key, len(x)), x)

    particles, accepted = jax.lax.scan(sweep, particles, random.split(key, num_moves))
    return particles, accepted.mean()


def bridge_sampling(model, args, draws, seed=0, num_iterations=50):
    """Log evidence by each chain, with a Normal proposal of all chains' mean and covariance; in double precision.

    Meng & Wong, "Simulating ratios of normalizing constants via a simple identity", Statistica Sinica 6 (1996).

    :param draws: latents by name, of shape (chains, draws, *shape).
    """
    space = Unconstrained(model, args)
    reals = {name: space.bijections[name].inv(x) for name, x in draws.items()}
    vectors = jax.jit(jax.vmap(jax.vmap(lambda x: ravel_pytree(x)[0])))(reals)
    flat = np.asarray(vectors).reshape(-1, vectors.shape[-1])
    proposal = multivariate_normal(flat.mean(0), np.cov(flat.T))
    proposed = proposal.rvs(vectors.shape[:2], np.random.default_rng(seed)).reshape(vectors.shape)
    joint = jax.jit(lambda x: jax.lax.map(lambda x: sum(space.log_densities(x, args)), x, batch_size=500))
    results = []
    for chain, new in zip(vectors, proposed):
        here, there = (np.asarray(joint(x)) - proposal.logpdf(x).reshape(-1) for x in (chain, new))
        log_evidence = np.median(here)
        for _ in range(num_iterations):
            # log of l / (l / 2 + r / 2) at proposals, and of 1 / (l / 2 + r / 2) at draws, up to the same constant.
            above = logsumexp(there - np.logaddexp(there, log_evidence))
            log_evidence = above - logsumexp(-np.logaddexp(here, log_evidence))
        results.append(log_evidence)
    return np.array(results)
