"""Models, distributions and references that several test files share."""

from collections.abc import Callable
from functools import partial
import importlib.util
import itertools
from pathlib import Path
from typing import NamedTuple

import arviz as az
import jax
from jax.nn import logsumexp
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.util import log_density
import pytest

from numpyro_vimco import REINFORCE, VIMCO, Posterior, VIMCOStar
from numpyro_vimco.draws.approximation import Approximation
from numpyro_vimco.fitting.run import Fit
from numpyro_vimco.fitting.state import FitState, Starts

EXAMPLES = Path(__file__).parent.parent / "examples"


def load_example(name):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arviz_psislw(log_weight):
    """ArviZ's Pareto smoothing over the last axis: smoothed normalized log-weights, and k."""
    if az.__version__.startswith("0."):
        return az.psislw(log_weight)
    from arviz_stats.base import array_stats

    smoothed, k = array_stats.psislw(-log_weight)
    return smoothed, np.where(np.isnan(k), np.inf, k)  # NaN where its tail is far from a Pareto distribution


def pointwise_loo(tree):
    """``az.loo`` by element: of ArviZ 0.x, and of 1.x."""
    found = az.loo(tree, pointwise=True)
    return np.asarray(found.loo_i if hasattr(found, "loo_i") else found.elpd_i)


def of_two_lengths(cases, short):
    """Parameters of a test: those in ``short`` for `make test`, all others for `make test-long`."""
    parts = [(case, case if isinstance(case, tuple) else (case,)) for case in cases]
    return [case if case in short else pytest.param(*values, marks=pytest.mark.long) for case, values in parts]


class ScoreNormal(dist.Normal):
    """A Normal that claims to have no reparameterised sampler."""

    reparametrized_params = []


class Program(NamedTuple):
    """A model, its guide, and what an enumeration of the guide needs.

    :ivar outcomes: all joint outcomes of one particle, a dict of arrays with a leading axis.
    :ivar sampler: what the guide draws from, where that is not its log-density (scaled sites, factors).
    """

    model: Callable
    guide: Callable
    outcomes: dict
    sampler: Callable | None = None


UNBIASED = {
    "VIMCOStar": VIMCOStar,
    "VIMCO geometric": VIMCO,
    "VIMCO arithmetic": lambda *args: VIMCO(*args, baseline="arithmetic"),
    "REINFORCE": REINFORCE,
}


def product_of(**supports):
    """All joint outcomes of discrete sites, given the values of each."""
    outcomes = list(itertools.product(*supports.values()))
    return {name: jnp.array([outcome[i] for outcome in outcomes]) for i, name in enumerate(supports)}


def posterior_at(svi, params, *args, losses=None, inverse_temperature=None, failed=None, log_evidence=None):
    """A posterior as `fit` might have returned it; parameters have a leading axis for the starts.

    The best start is the first one, if no log evidence is given.
    """
    num_starts = len(jax.tree.leaves(params)[0])
    losses = np.zeros((num_starts, 1)) if losses is None else np.asarray(losses)
    failed = np.zeros(num_starts, bool) if failed is None else np.asarray(failed)
    inverse_temperature = np.ones_like(losses) if inverse_temperature is None else np.asarray(inverse_temperature)
    log_evidence = np.arange(0.0, -num_starts, -1) if log_evidence is None else np.asarray(log_evidence)
    steps = jnp.array(losses.shape[1]), jnp.zeros(num_starts, int), jnp.ones(())
    state = FitState(jnp.zeros(num_starts), *steps, jnp.asarray(failed))
    starts = Starts(params, losses, inverse_temperature, None, failed, log_evidence, np.full(num_starts, 0.01))
    kept = jax.tree.map(lambda leaf: leaf[starts.kept], params)
    approx = Approximation.of(svi, kept, len(starts.kept), args, {})
    approx = approx.at(kept, len(starts.kept), int(np.searchsorted(starts.kept, starts.best)))
    return Posterior._of(Fit(approx, starts, state, None, None, jax.random.key(0)), progress_bar=False)


def said(posterior):
    """All findings as one text."""
    return " ".join(map(str, posterior.findings))


def codes(posterior):
    """The codes of all findings."""
    return [finding.code for finding in posterior.findings]


def initial_params(*programs):
    """The parameters of some programs at their initial values."""
    params = {}
    for program in programs:
        sites = trace(seed(program, 0)).get_trace().values()
        params.update({site["name"]: jnp.asarray(site["value"], float) for site in sites if site["type"] == "param"})
    return params


def log_densities(program, params, outcomes):
    """Log-density of a program at each outcome, by NumPyro."""
    return jax.vmap(lambda outcome: log_density(program, (), {}, {**params, **outcome})[0])(outcomes)


def all_particles(program, params, num_particles):
    """Every outcome of all particles: indices into ``program.outcomes`` (outcomes, N), and probabilities."""
    log_q = log_densities(program.sampler or program.guide, params, program.outcomes)
    indices = jnp.array(list(itertools.product(range(len(log_q)), repeat=num_particles)))
    return indices, jnp.exp(log_q[indices].sum(1))


def exact_bound(program, params, alpha, num_particles):
    """The VR-IWAE bound as a finite sum; differentiable."""
    log_p = log_densities(program.model, params, program.outcomes)
    log_w = log_p - log_densities(program.guide, params, program.outcomes)
    indices, probability = all_particles(program, params, num_particles)
    log_w = log_w[indices]
    if alpha == 1:
        return probability @ log_w.mean(1)
    return probability @ (logsumexp((1 - alpha) * log_w, axis=1) - np.log(num_particles)) / (1 - alpha)


def expected_estimate(make_objective, program, params, num_particles):
    """Probability-weighted sum of an estimator's bound and gradient, over every outcome of all particles.

    :param make_objective: from ``vectorize_particles`` to an objective.
    """

    def estimate(indices):
        def vectorize(fn, keys):
            def run(key, outcome):
                with substitute(data=outcome):
                    return fn(key)

            return jax.vmap(run)(keys, {name: values[indices] for name, values in program.outcomes.items()})

        loss = make_objective(vectorize).loss
        return jax.value_and_grad(lambda params: -loss(jax.random.key(0), params, program.model, program.guide))(params)

    indices, probability = all_particles(program, params, num_particles)
    return jax.tree.map(lambda x: jnp.tensordot(probability, x, axes=1), jax.vmap(estimate)(indices))


def assert_unbiased_over_outcomes(model, guide, sites, log_weight, alpha, **particles):
    """The expected bound and its gradient are the exact ones, by every outcome of 2 particles with 2 local ones.

    :param sites: of each site its level, a plate or a chain, or None, and the shape of its value, which is binary.
    :param log_weight: from parameters and the values of one particle to its log-weight and log-probability, by hand.
    :param particles: ``plate_particles`` or ``chain_particles``.
    """
    shapes = {name: shape if level is None else (2, *shape) for name, (level, shape) in sites.items()}
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    outcomes = jnp.array(list(itertools.product([0, 1], repeat=sum(sizes))))
    parts = jnp.split(outcomes, np.cumsum(sizes)[:-1], axis=1)
    outcomes = {name: part.reshape(-1, *shape) for (name, shape), part in zip(shapes.items(), parts)}
    params = initial_params(model, guide)
    pairs = jnp.array(list(itertools.product(range(len(parts[0])), repeat=2)))

    def exact(params):
        log_w, log_q = jax.vmap(lambda outcome: log_weight(params, **outcome))(outcomes)
        log_w, probability = log_w[pairs], jnp.exp(log_q[pairs].sum(1))
        if alpha == 1:
            return probability @ log_w.mean(1)
        return probability @ (logsumexp((1 - alpha) * log_w, axis=1) - np.log(2)) / (1 - alpha)

    def estimate(params, pair):
        def vectorize(fn, keys):
            def run(key, outcome):
                def choose(site):
                    if site["type"] != "sample" or site["name"] not in outcome:
                        return None
                    level, value = sites[site["name"]][0], outcome[site["name"]]
                    if level is None:
                        return value
                    try:
                        return value[jax.lax.axis_index(level)]
                    except NameError:  # where samples of chains are not drawn
                        return None

                with substitute(substitute_fn=choose):
                    return fn(key)

            return jax.vmap(run)(keys, {name: values[pair] for name, values in outcomes.items()})

        objective = VIMCOStar(alpha, 2, vectorize, doubly_reparameterized=False, **particles)
        return jax.value_and_grad(lambda params: -objective.loss(jax.random.key(0), params, model, guide))(params)

    @jax.jit
    def expected(params):
        _, log_q = jax.vmap(lambda outcome: log_weight(params, **outcome))(outcomes)
        probability = jnp.exp(log_q[pairs].sum(1))
        estimates = jax.lax.map(lambda pair: estimate(params, pair), pairs, batch_size=2048)
        return jax.tree.map(lambda x: jnp.tensordot(probability, x, axes=1), estimates)

    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=0, atol=1e-10),
        expected(params),
        jax.jit(jax.value_and_grad(exact))(params),
    )
