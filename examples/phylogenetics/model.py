"""The model of a tree, and its guide, as NumPyro programs."""

import jax.numpy as jnp
import numpyro
from numpyro import distributions as dist

from .alignment import Alignment
from .likelihood import log_likelihood
from .subsplits import SubsplitBayesianNetwork, Support, UniformTopology

PRIOR_MEAN_BRANCH = 0.1  # substitutions per site


def model(trees: Support, alignment: Alignment, inverse_temperature=1.0, pairs=True):
    """A uniform topology, i.i.d. exponential branch lengths, and Jukes-Cantor substitution.

    :param inverse_temperature: the power of the likelihood: less than 1 early in a fit.
    :param pairs: for the guide.
    """
    topology = numpyro.sample("topology", UniformTopology(trees))
    prior = dist.Exponential(1 / PRIOR_MEAN_BRANCH).expand([2 * len(trees.taxa) - 3]).to_event(1)
    branch_lengths = numpyro.sample("branch_lengths", prior)
    numpyro.deterministic("tree_length", jnp.sum(branch_lengths))
    log_prob = log_likelihood(trees.children(topology), branch_lengths, alignment)
    numpyro.factor("alignment", inverse_temperature * log_prob)


def guide(trees: Support, alignment: Alignment, inverse_temperature=1.0, pairs=True):
    """A subsplit Bayesian network, and a LogNormal for each edge, whose parameters are looked up by its split.

    :param pairs: whether they are also looked up by the *primary subsplit pair* (Zhang and Matsen 2019): how the
        clades on either side of the edge split. These add to what the split says.
    """
    logits = numpyro.param("logits", jnp.zeros(trees.options.shape))
    topology = numpyro.sample("topology", SubsplitBayesianNetwork(logits, trees))
    edges = trees.edges(topology)

    def look_up(name, start):
        value = numpyro.param(f"{name}.split", jnp.full(len(trees.clades), start))[edges.split]
        if pairs:
            value += numpyro.param(f"{name}.below", jnp.zeros(len(trees.splits)))[edges.below]
            value += numpyro.param(f"{name}.above", jnp.zeros(2 * len(trees.splits)))[edges.above]
        return value

    of_edge = dist.LogNormal(look_up("loc", -3.0), jnp.exp(look_up("log_scale", -1.0)))
    numpyro.sample("branch_lengths", of_edge.to_event(1))
