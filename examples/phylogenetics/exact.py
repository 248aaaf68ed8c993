"""The posterior over few taxa's topologies by enumeration, each one's branch lengths integrated out by brute force."""

from functools import partial

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
from numpyro import distributions as dist
import optax

from .alignment import Alignment
from .likelihood import log_likelihood
from .model import PRIOR_MEAN_BRANCH
from .subsplits import Support, UniformTopology
from .trees import Topology, all_topologies


def exact_posterior(
    trees: Support,
    alignment: Alignment,
    rng_key,
    num_samples: int = 4000,
    within: float = 20.0,
) -> tuple[dict[Topology, float], float]:
    """The posterior over all topologies, and the log evidence in nats.

    The logarithms of the branch lengths are integrated out by importance sampling, from a Student-t distribution around
    their most probable values with the curvature there.

    :param trees: all topologies, by :meth:`Support.all`.
    :param num_samples: number of importance samples for each topology.
    :param within: topologies whose most probable branch lengths are so many nats less probable than the best are
        taken to have probability 0.
    """
    topologies = list(all_topologies(len(trees.taxa)))
    children = jax.vmap(trees.children)(np.stack([trees.entries(topology) for topology in topologies]))

    def log_density(children, log_lengths):
        lengths = jnp.exp(log_lengths)
        prior = dist.Exponential(1 / PRIOR_MEAN_BRANCH).log_prob(lengths)
        return log_likelihood(children, lengths, alignment) + jnp.sum(prior + log_lengths)

    adam = optax.adam(0.2)

    @jax.jit
    def climb(children):
        start = jnp.full(2 * len(trees.taxa) - 3, -3.0)

        def step(carry, _):
            log_lengths, state = carry
            slope = jax.grad(log_density, argnums=1)(children, log_lengths)
            updates, state = adam.update(-slope, state)
            return (optax.apply_updates(log_lengths, updates), state), None

        top, _ = jax.lax.scan(step, (start, adam.init(start)), None, length=100)[0]
        return top, log_density(children, top)

    @jax.jit
    def integrate(children, top, rng_key):
        hessian = jax.jacfwd(jax.grad(partial(log_density, children)))(top)
        values, vectors = jnp.linalg.eigh(-hessian)
        scale = jnp.linalg.cholesky((vectors / jnp.maximum(values, 0.1)) @ vectors.T)
        proposal = dist.MultivariateStudentT(5.0, top, scale)
        samples = proposal.sample(rng_key, (num_samples,))
        log_weights = jax.vmap(partial(log_density, children))(samples) - proposal.log_prob(samples)
        return jax.nn.logsumexp(log_weights) - jnp.log(num_samples)

    tops, heights = jax.lax.map(climb, children, batch_size=256)
    kept = np.flatnonzero(heights > heights.max() - within)
    chosen = children[kept], tops[kept], random.split(rng_key, len(kept))
    log_integrals = np.full(len(topologies), -np.inf)
    log_integrals[kept] = jax.lax.map(lambda one: integrate(*one), chosen)
    total = np.logaddexp.reduce(log_integrals)
    posterior = dict(zip(topologies, np.exp(log_integrals - total).tolist()))
    return posterior, float(total - np.log(UniformTopology(trees).size))
