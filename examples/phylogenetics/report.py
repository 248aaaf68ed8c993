"""What a fit is worth: bounds, evidence, distance to a reference, and the posterior over topologies."""

from collections.abc import Callable, Sequence

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
from numpyro.infer import SVI

from numpyro_vimco import VIMCOStar

from .subsplits import SubsplitBayesianNetwork, Support
from .trees import Topology


def make_bounds(svi: SVI, args: tuple, repeats: int = 20) -> Callable:
    """A compiled function of parameters and a key, to bounds in nats, by name, of shape (repeats,).

    `ELBO`, the bound at N = 1; that at N = 10; `log evidence`, the estimate from 1,000 importance samples.
    """

    def bound(alpha, num_particles):
        objective = VIMCOStar(alpha, num_particles, chunk_size=min(num_particles, 100))
        return lambda params, key: -objective.loss(key, params, svi.model, svi.guide, *args, **svi.static_kwargs)

    # At α = 1 the bound is the mean log-weight.
    elbo, ten, evidence = bound(1.0, 1000), bound(0.0, 10), bound(0.0, 1000)

    @jax.jit
    def bounds(params, rng_key):
        def once(key):
            return {
                "ELBO": elbo(params, key),
                "N = 10": jnp.mean(jax.lax.map(lambda key: ten(params, key), random.split(key, 50))),
                "log evidence": evidence(params, key),
            }

        return jax.lax.map(once, random.split(rng_key, repeats))

    return bounds


def log_probabilities(trees: Support, logits, topologies: Sequence[Topology]) -> np.ndarray:
    """Log-probabilities of topologies under the guide, in nats; -inf where the support has none of it."""
    entries = np.stack([trees.entries(topology) for topology in topologies])
    return np.asarray(SubsplitBayesianNetwork(logits, trees).log_prob(entries))


def kl_divergence(reference: Sequence[float], log_q: np.ndarray) -> float:
    """KL divergence in nats from a reference distribution to the guide's."""
    p = np.asarray(reference)
    return float(np.sum(p * (np.log(p) - log_q)))
