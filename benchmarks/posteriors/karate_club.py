"""The karate club of Zachary (1977): who belongs to which of two groups, by who is whose friend.

A stochastic block model with more friends within groups than between them, the first member in group 0. Truth: Gibbs
sampling of 200 chains over members, with the two logits on a grid.
"""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy.special import expit, logsumexp
from scipy.stats import norm

from benchmarks.posteriors import exact_probabilities

# fmt: off
FRIENDS = {
    0: [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 17, 19, 21, 31], 1: [2, 3, 7, 13, 17, 19, 21, 30],
    2: [3, 7, 8, 9, 13, 27, 28, 32], 3: [7, 12, 13], 4: [6, 10], 5: [6, 10, 16], 6: [16], 8: [30, 32, 33], 9: [33],
    13: [33], 14: [32, 33], 15: [32, 33], 18: [32, 33], 19: [33], 20: [32, 33], 22: [32, 33], 23: [25, 27, 29, 32, 33],
    24: [25, 27, 31], 25: [31], 26: [29, 33], 27: [33], 28: [31, 33], 29: [32, 33], 30: [32, 33], 31: [32, 33],
    32: [33],
}
# fmt: on
EDGES = np.zeros((34, 34), int)
for one, others in FRIENDS.items():
    EDGES[one, others] = EDGES[others, one] = 1


def data():
    return (jnp.asarray(EDGES),)


def block_model(edges, prior):
    """Friends with one logit between groups, and ``more`` within them, by a prior."""
    between = numpyro.sample("between", dist.Normal(-2, 1.5))
    more = numpyro.sample("more", prior)
    with numpyro.plate("member", 33):
        group = numpyro.sample("group", dist.Bernoulli(0.5))
    group = jnp.concatenate([jnp.zeros(1, int), group])
    pairs = np.triu_indices(34, 1)
    logits = between + more * (group[pairs[0]] == group[pairs[1]])
    with numpyro.plate("pair", len(pairs[0])):
        numpyro.sample("edge", dist.Bernoulli(logits=logits), obs=edges[pairs])


def model(edges):
    block_model(edges, dist.HalfNormal(2.0))


def block_model_of_pymc(edges, prior):
    """The same for PyMC.

    :param prior: from a name to its random variable.
    """
    import pymc as pm

    pairs = np.triu_indices(34, 1)
    with pm.Model() as built:
        between = pm.Normal("between", -2, 1.5)
        more = prior("more")
        group = pm.math.concatenate([np.zeros(1, int), pm.Bernoulli("group", 0.5, shape=33)])
        logits = between + more * pm.math.eq(group[pairs[0]], group[pairs[1]])
        pm.Bernoulli("edge", logit_p=logits, observed=np.asarray(edges)[pairs])
    return built


def pymc_model(edges):
    import pymc as pm

    return block_model_of_pymc(edges, lambda name: pm.HalfNormal(name, 2.0))


class Gibbs:
    """Moves of many chains at a time: the two logits on a grid, then one member after the other.

    :param between: grid of the logit between groups.
    :param more: grid of what is added within groups; its prior is Normal(0, 2) on the grid.
    """

    def __init__(self, edges, between, more, rng):
        self.edges, self.rng = np.asarray(edges), rng
        between, self.more = (x.ravel() for x in np.meshgrid(between, more))
        log_prior = norm(-2, 1.5).logpdf(between) + norm(0, 2.0).logpdf(self.more)
        self.log_prior = log_prior - logsumexp(log_prior)
        # Of each grid point, between groups and within: the logit of an edge, and the log-probability of none.
        self.logits = np.stack([between, between + self.more])
        self.log_none = np.log(expit(-self.logits))

    def counts(self, sign):
        """Edges and pairs of each chain, between groups and within; groups are signs, of shape (chains, 34)."""
        num_pairs, num_edges = 34 * 33 / 2, self.edges.sum() / 2
        pairs = (num_pairs + (sign.sum(1) ** 2 - 34) / 2) / 2
        edges = (num_edges + np.einsum("ci,ij,cj->c", sign, self.edges, sign) / 2) / 2
        return np.stack([num_edges - edges, edges]), np.stack([num_pairs - pairs, pairs])

    def sweep(self, sign, inverse_temperature=1.0):
        """Move all chains, in place, with the likelihood at an inverse temperature; return their grid points."""
        edges, pairs = self.counts(sign)
        log_joint = self.log_prior + inverse_temperature * (edges.T @ self.logits + pairs.T @ self.log_none)
        probability = np.exp(log_joint - log_joint.max(1, keepdims=True)).cumsum(1)
        chosen = (probability < self.rng.random((len(sign), 1)) * probability[:, -1:]).sum(1)
        # What a pair gains in one group: without an edge, and more with one.
        absent = (self.log_none[1] - self.log_none[0])[chosen]
        present = self.more[chosen]
        for i in range(1, 34):
            logits = inverse_temperature * (absent * (sign.sum(1) - sign[:, i]) + present * (sign @ self.edges[i]))
            sign[:, i] = np.where(self.rng.random(len(sign)) < expit(logits), 1.0, -1.0)
        return chosen


def truth(edges, num_sweeps=500, num_chains=200):
    """The members' groups, with standard errors over chains; no log evidence."""
    gibbs = Gibbs(edges, np.linspace(-5, 1, 61), np.linspace(0.05, 6, 60), np.random.default_rng(0))
    sign = np.where(np.arange(34) < 17, -1.0, 1.0) * np.ones((num_chains, 1))
    total = np.zeros((num_chains, 33))
    for sweep in range(num_sweeps + 200):
        gibbs.sweep(sign)
        if sweep >= 200:
            total += sign[:, 1:] > 0
    of_chains = total / num_sweeps
    found = exact_probabilities({"group": of_chains.mean(0)}, None, f"Gibbs sampling of {num_chains} chains")
    return found._replace(errors={"group": of_chains.std(0) / num_chains**0.5})
