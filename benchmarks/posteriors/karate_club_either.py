"""The karate club where friends may be within groups or between them: nothing says which.

The same stochastic block model with a prior that is symmetric about equal friendship: a split into leaders and the
others competes with that into two clubs. Truth: sequential Monte Carlo along powers of the likelihood, with Gibbs moves
of the members and the two logits on a grid; standard errors of about 0.02 nats and 0.003.
"""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy.special import expit, logsumexp
from scipy.stats import norm

from benchmarks.posteriors.karate_club import data

__all__ = ["data", "model", "truth"]


def model(edges):
    between = numpyro.sample("between", dist.Normal(-2, 1.5))
    more = numpyro.sample("more", dist.Normal(0, 2.0))
    with numpyro.plate("member", 33):
        group = numpyro.sample("group", dist.Bernoulli(0.5))
    group = jnp.concatenate([jnp.zeros(1, int), group])
    pairs = np.triu_indices(34, 1)
    logits = between + more * (group[pairs[0]] == group[pairs[1]])
    with numpyro.plate("pair", len(pairs[0])):
        numpyro.sample("edge", dist.Bernoulli(logits=logits), obs=edges[pairs])


def truth(edges, num_particles=4000, num_powers=150):
    """Log evidence and the members' groups."""
    rng = np.random.default_rng(0)
    edges = np.asarray(edges)
    between, more = (x.ravel() for x in np.meshgrid(np.linspace(-6, 3, 46), np.linspace(-6, 6, 61)))
    log_prior = norm(-2, 1.5).logpdf(between) + norm(0, 2.0).logpdf(more)
    log_prior -= logsumexp(log_prior)
    log_odds = [(logits, np.log(expit(-logits))) for logits in (between, between + more)]
    num_pairs, num_edges = 34 * 33 / 2, edges.sum() / 2

    def counts(sign):
        """Of pairs and of edges: between groups and within."""
        pairs_within = (num_pairs + (sign.sum(1) ** 2 - 34) / 2) / 2
        edges_within = (num_edges + np.einsum("ci,ij,cj->c", sign, edges, sign) / 2) / 2
        pairs, friends = (
            np.stack([num_pairs - pairs_within, pairs_within]),
            np.stack([num_edges - edges_within, edges_within]),
        )
        return pairs, friends

    def log_likelihood(sign, chosen):
        pairs, friends = counts(sign)
        return sum(friends[i] * log_odds[i][0][chosen] + pairs[i] * log_odds[i][1][chosen] for i in (0, 1))

    sign = np.where(rng.random((num_particles, 34)) < 0.5, 1.0, -1.0)
    sign[:, 0] = -1
    chosen = rng.choice(len(log_prior), num_particles, p=np.exp(log_prior))
    log_evidence, power = 0.0, 0.0
    for new in np.linspace(0, 1, num_powers + 1)[1:] ** 2:
        log_weight = (new - power) * log_likelihood(sign, chosen)
        log_evidence += logsumexp(log_weight) - np.log(num_particles)
        weight = np.exp(log_weight - logsumexp(log_weight))
        points = (np.arange(num_particles) + rng.random()) / num_particles
        index = np.searchsorted(weight.cumsum(), points).clip(max=num_particles - 1)
        sign, chosen, power = sign[index], chosen[index], new
        for _ in range(1 if new < 1 else 20):
            pairs, friends = counts(sign)
            log_joint = np.zeros((num_particles, len(log_prior)))
            for i in (0, 1):
                log_joint += np.outer(friends[i], log_odds[i][0]) + np.outer(pairs[i], log_odds[i][1])
            log_joint = log_prior + power * log_joint
            probability = np.exp(log_joint - log_joint.max(1, keepdims=True)).cumsum(1)
            chosen = (probability < rng.random((num_particles, 1)) * probability[:, -1:]).sum(1)
            absent = (log_odds[1][1] - log_odds[0][1])[chosen]
            present = more[chosen]
            for i in range(1, 34):
                logits = power * (absent * (sign.sum(1) - sign[:, i]) + present * (sign @ edges[i]))
                sign[:, i] = np.where(rng.random(num_particles) < expit(logits), 1.0, -1.0)
    return log_evidence, {"group": (sign[:, 1:] > 0).mean(0)}
