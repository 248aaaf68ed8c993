"""The likelihood of a tree under the Jukes-Cantor model, by Felsenstein's pruning, with its own backward pass.

A tree of n taxa is rooted on the edge to the last taxon, the outgroup. Nodes are numbered: taxa from 0 to n - 1, then
the n - 2 internal nodes from the root downwards, each before its descendants. ``children``, of shape (n - 2, 2), holds
the two nodes below each internal one. Of ``branch_lengths``, of shape (2n - 3,), number 2t + side leads to
``children[t, side]``, the last one from the root to the outgroup; their unit is substitutions per site.

Under Jukes-Cantor, a branch of length b carries partial likelihoods x over to (1 - r) x + r mean(x), where
r = 1 - exp(-4b/3) is the probability that the state is drawn anew: no matrix is needed.
"""

import jax
import jax.numpy as jnp

from .alignment import Alignment


def log_likelihood(children, branch_lengths, alignment: Alignment):
    """Log-likelihood in nats of a tree, differentiable in the branch lengths and in nothing else."""
    return _log_likelihood(children, branch_lengths, alignment.tips, alignment.counts)


def renewal(branch_lengths):
    """The probability that a state is drawn anew along a branch."""
    return -jnp.expm1(-4 / 3 * branch_lengths)


def total(x):
    """The sum over states, of shape (..., S). Written out: XLA's sum over a small axis is several times slower."""
    return x[..., 0, :] + x[..., 1, :] + x[..., 2, :] + x[..., 3, :]


def carried(x, r):
    """Partial likelihoods x of shape (..., 4, S) at the other end of a branch."""
    return x + r * (total(x)[..., None, :] / 4 - x)


@jax.custom_vjp
def _log_likelihood(children, branch_lengths, tips, counts):
    return _forward(children, branch_lengths, tips, counts)[0]


def _forward(children, branch_lengths, tips, counts):
    """From the leaves to the root, with what each branch carries upwards: its message."""
    num_taxa, _, num_patterns = tips.shape
    num_nodes = num_taxa - 2
    r = renewal(branch_lengths)
    # Which branch is above each node; that of the outgroup and of the root is the last.
    is_above = children.reshape(-1) == jnp.arange(num_taxa + num_nodes)[:, None]
    above = jnp.where(jnp.any(is_above, axis=1), jnp.argmax(is_above, axis=1), children.size)

    def visit(carry, node):
        messages, log_scale = carry
        pair, r, position = node
        partials = messages[pair[0]] * messages[pair[1]]
        scale = total(partials)  # against underflow
        message = carried(partials / scale, r)
        messages = jax.lax.dynamic_update_index_in_dim(messages, message, position, 0)
        return (messages, log_scale + jnp.log(scale)), None

    messages = carried(tips, r[above[:num_taxa], None, None])
    messages = jnp.concatenate([messages, jnp.zeros((num_nodes, *tips.shape[1:]), tips.dtype)])
    nodes = children, r[above[num_taxa:]], num_taxa + jnp.arange(num_nodes)
    start = messages, jnp.zeros(num_patterns, tips.dtype)
    (messages, log_scale), _ = jax.lax.scan(visit, start, nodes, reverse=True)
    site = total(tips[-1] * messages[num_taxa]) / 4
    return counts @ (log_scale + jnp.log(site)), (children, above, r, tips, counts, messages)


def _backward(residuals, cotangent):
    """From the root to the leaves, with the partial likelihoods of all that is outside of a node's subtree.

    At the upper end of a branch, let O(i) be that of all outside of it and m(i) its message, given state i. A site's
    likelihood is Σ O m / 4, and as dm/db = -4/3 (m - mean(m)), because mean(m) does not depend on b, the slope of its
    logarithm is -4/3 (1 - mean(m) Σ O / Σ O m). Scales cancel.
    """
    children, above, r, tips, counts, messages = residuals
    num_taxa = len(tips)
    num_nodes = num_taxa - 2

    def ratio(outside, message):
        return total(outside) * total(message) / (4 * total(outside * message))

    def visit(at_nodes, node):
        parent, sibling, r, position = node
        at_node = carried(at_nodes[parent] * messages[sibling], r)
        return jax.lax.dynamic_update_index_in_dim(at_nodes, at_node / total(at_node), position, 0), None

    below_root = above[num_taxa + 1 :]
    at_nodes = jnp.zeros((num_nodes, *tips.shape[1:]), tips.dtype).at[0].set(carried(tips[-1], r[-1]))
    nodes = below_root // 2, children.reshape(-1)[below_root ^ 1], r[below_root], jnp.arange(1, num_nodes)
    at_nodes, _ = jax.lax.scan(visit, at_nodes, nodes)
    left, right = messages[children[:, 0]], messages[children[:, 1]]
    ratios = jnp.stack([ratio(at_nodes * right, left), ratio(at_nodes * left, right)], axis=1)
    ratios = jnp.concatenate([ratios.reshape(children.size, -1), ratio(tips[-1], messages[num_taxa])[None]])
    gradient = -4 / 3 * (jnp.sum(counts) - ratios @ counts)
    return None, cotangent * gradient, None, None


_log_likelihood.defvjp(_forward, _backward)
