"""Distributions over tree topologies: subsplit Bayesian networks [1], and the uniform one.

A *subsplit* is what a clade splits into in a tree. Where the clade stands, on one of the two sides of its parent's
subsplit, is its *place*: a row of a table of conditional probabilities, whose options are the subsplits seen at this
place in some trees, the support. Rooted on the outgroup's edge, an unrooted topology is one sequence of such choices,
and its probability a product of table entries; no sum over positions of the root is needed.

A topology is an integer vector of shape (n - 2,): the table entries chosen, row * width + column, of the internal
nodes from the root downwards, breadth first.

1. Zhang and Matsen 2018, "Generalizing tree probability estimation via Bayesian networks", NeurIPS
"""

from collections.abc import Iterable, Iterator, Sequence
import math
from typing import NamedTuple

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
from numpyro import distributions as dist
from numpyro.distributions import constraints

from . import InputError
from .trees import Topology, all_topologies, children_of

Subsplit = tuple[int, int]
Place = tuple[Subsplit, int] | None  # subsplit of the parent and side; None is the root's


def choices(topology: Topology) -> Iterator[tuple[Place, Subsplit]]:
    """The place and subsplit of each internal node, breadth first."""
    parts = children_of(topology)
    queue: list[tuple[Place, int]] = [(None, max(topology))]
    for place, clade in queue:
        left, right = parts[clade]
        yield place, (left, right)
        queue += [(((left, right), side), child) for side, child in enumerate((left, right)) if child in parts]


class Edges(NamedTuple):
    """What a topology looks like around each of its 2n - 3 edges, as numbers, ordered as in :mod:`.likelihood`.

    :ivar split: the edge's split of the taxa.
    :ivar below: the subsplit of the clade below; the same number, 0, for all leaves.
    :ivar above: the clade's place; 0 for the root's.
    """

    split: jax.Array
    below: jax.Array
    above: jax.Array


class Support:
    """The subsplits of some topologies, as tables. Subsplits are numbered from 1, with 0 for none.

    :ivar clades: of each split, the clade below it.
    :ivar options: the subsplit chosen by an entry, of shape (rows, width); 0 where a row is shorter.
    :ivar splits: the two splits below a subsplit, of shape (subsplits, 2).
    :ivar leaves: the taxon of a clade of one, else -1, of the same shape.
    :ivar rows: the row of either side, -1 for a leaf, of the same shape.
    """

    def __init__(self, topologies: Iterable[Topology], taxa: Sequence[str]):
        self.taxa = list(taxa)
        self._columns: dict[Place, dict[Subsplit, int]] = {None: {}}
        for topology in topologies:
            for place, subsplit in choices(topology):
                columns = self._columns.setdefault(place, {})
                columns.setdefault(subsplit, len(columns))
        self._row = {place: row for row, place in enumerate(self._columns)}

        subsplits = list(dict.fromkeys(subsplit for columns in self._columns.values() for subsplit in columns))
        number = {subsplit: index for index, subsplit in enumerate(subsplits, 1)}
        self.options = np.zeros((len(self._columns), max(map(len, self._columns.values()))), int)
        for row, columns in enumerate(self._columns.values()):
            self.options[row, : len(columns)] = [number[subsplit] for subsplit in columns]

        whole = (1 << (len(taxa) - 1)) - 1
        self.clades = [whole, *sorted({clade for subsplit in subsplits for clade in subsplit})]
        split = {clade: index for index, clade in enumerate(self.clades)}
        taxon = [clade.bit_length() - 1 if clade.bit_count() == 1 else -1 for clade in self.clades]
        self.splits = np.array([(0, 0), *((split[left], split[right]) for left, right in subsplits)])
        self.leaves = np.array(taxon)[self.splits]
        self.rows = np.array([(-1, -1), *([self._row.get((pair, side), -1) for side in (0, 1)] for pair in subsplits)])

    @classmethod
    def all(cls, taxa: Sequence[str]) -> "Support":
        """All topologies of up to 8 taxa."""
        if len(taxa) > 8:
            raise InputError(f"{len(taxa)} taxa have too many topologies to list them all; give candidate trees.")
        return cls(all_topologies(len(taxa)), taxa)

    @property
    def num_nodes(self) -> int:
        """Number of internal nodes, n - 2."""
        return len(self.taxa) - 2

    def ways(self) -> list[int]:
        """In how many ways a clade can be resolved, by row: of the first, how many topologies the support holds."""
        size = [place[0][place[1]].bit_count() if place else len(self.taxa) for place in self._columns]
        ways = [0] * len(size)
        for row in sorted(range(len(size)), key=size.__getitem__):
            ways[row] = sum(self._ways_of(option, ways) for option in self.options[row] if option)
        return ways

    def _ways_of(self, subsplit: int, ways: list[int]) -> int:
        return math.prod(ways[row] for row in self.rows[subsplit] if row >= 0)

    def uniform_logits(self) -> np.ndarray:
        """Logits, of shape (rows, width), under which all topologies of the support have the same probability."""
        ways = self.ways()
        return np.array(
            [[math.log(self._ways_of(option, ways)) if option else 0.0 for option in row] for row in self.options]
        )

    def entries(self, topology: Topology) -> np.ndarray:
        """A topology as a vector.

        :raises KeyError: if it is not in the support.
        """
        width = self.options.shape[1]
        return np.array(
            [self._row[place] * width + self._columns[place][subsplit] for place, subsplit in choices(topology)]
        )

    def topology(self, entries) -> Topology:
        """The topology that a vector stands for."""
        below = self.splits[self.options.reshape(-1)[np.asarray(entries)]]
        return frozenset(self.clades[0:1]) | {self.clades[i] for i in below.flat if self.clades[i].bit_count() > 1}

    def subsplits(self, entries):
        """The subsplit of each internal node."""
        return jnp.asarray(self.options.reshape(-1))[entries]

    def children(self, entries):
        """The nodes below each internal node, of shape (n - 2, 2), as :mod:`.likelihood` wants them."""
        leaf = jnp.asarray(self.leaves)[self.subsplits(entries)]
        nodes = jnp.cumsum((leaf < 0).reshape(-1)).reshape(leaf.shape)
        return jnp.where(leaf < 0, len(self.taxa) + nodes, leaf)

    def edges(self, entries) -> Edges:
        """The surroundings of each edge."""
        subsplits, children = self.subsplits(entries), self.children(entries)
        below = jnp.where(children < len(self.taxa), 0, subsplits[children - len(self.taxa)])
        return Edges(
            split=jnp.append(jnp.asarray(self.splits)[subsplits], 0),
            below=jnp.append(below, subsplits[0]),
            above=jnp.append(2 * subsplits[:, None] + jnp.arange(2), 0),
        )


class _Supported(constraints.Constraint):
    event_dim = 1
    is_discrete = True

    def __init__(self, trees: Support):
        self.trees = trees

    def tree_flatten(self):
        return (), ((), {"trees": self.trees})

    def __call__(self, x):
        trees = self.trees

        def of_one(entries):
            subsplits, children = trees.subsplits(entries), trees.children(entries)
            # The row of each node's table; a leaf's place is outside of the vector.
            rows = jnp.zeros_like(entries).at[children - len(trees.taxa)]
            rows = rows.set(jnp.asarray(trees.rows)[subsplits], mode="drop", wrap_negative_indices=False)
            return jnp.all((subsplits > 0) & (rows == entries // trees.options.shape[1]))

        return jnp.vectorize(of_one, signature="(n)->()")(x)


class SubsplitBayesianNetwork(dist.Distribution):
    """A subsplit Bayesian network over the topologies that the subsplits of some trees combine to.

    Not reparameterisable: ``has_rsample`` is False.

    :param logits: of the conditional probabilities, of shape (rows, width); those where a row is shorter do not count.
    :param Support trees: the support.
    """

    arg_constraints = {"logits": constraints.independent(constraints.real, 2)}
    pytree_aux_fields = ("trees",)

    def __init__(self, logits, trees: Support, *, validate_args=None):
        if jnp.shape(logits) != trees.options.shape:
            raise ValueError(f"logits have shape {jnp.shape(logits)}, but the support's tables {trees.options.shape}.")
        self.logits, self.trees = logits, trees
        super().__init__(batch_shape=(), event_shape=(trees.num_nodes,), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self):
        """All topologies that the tables' rows combine to."""
        return _Supported(self.trees)

    @property
    def table(self):
        """Logarithms of the conditional probabilities."""
        return jax.nn.log_softmax(jnp.where(self.trees.options > 0, self.logits, -jnp.inf), axis=1)

    def sample(self, key, sample_shape=()):
        """Draw topologies, of shape (*sample_shape, n - 2), each from its root downwards."""
        table, trees = self.table, self.trees
        options, rows_below, width = jnp.asarray(trees.options), jnp.asarray(trees.rows), trees.options.shape[1]

        def visit(carry, node):
            rows, free = carry
            position, noise = node
            column = jnp.argmax(table[rows[position]] + noise)
            below = rows_below[options[rows[position], column]]
            slots = free + jnp.cumsum(below >= 0) - 1
            rows = rows.at[jnp.where(below >= 0, slots, trees.num_nodes)].set(below, mode="drop")
            return (rows, free + jnp.sum(below >= 0)), rows_below.dtype.type(width) * rows[position] + column

        def draw(key):
            noise = random.gumbel(key, (trees.num_nodes, width))
            start = jnp.zeros(trees.num_nodes, rows_below.dtype), jnp.ones((), rows_below.dtype)
            return jax.lax.scan(visit, start, (jnp.arange(trees.num_nodes), noise))[1]

        keys = random.split(key, math.prod(sample_shape))
        return jax.vmap(draw)(keys).reshape(*sample_shape, trees.num_nodes)

    @dist.util.validate_sample
    def log_prob(self, value):
        """Log-probability in nats."""
        return jnp.sum(self.table.reshape(-1)[value], axis=-1)


class UniformTopology(dist.Distribution):
    """The uniform distribution over all (2n - 5)!! topologies of n taxa, in a support or not.

    It can be drawn from if all of them are in the support.

    :param Support trees: the support, which numbers them.
    """

    pytree_aux_fields = ("trees",)

    def __init__(self, trees: Support, *, validate_args=None):
        self.trees = trees
        super().__init__(batch_shape=(), event_shape=(trees.num_nodes,), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self):
        """All topologies that the support's rows combine to."""
        return _Supported(self.trees)

    @property
    def size(self) -> int:
        """(2n - 5)!!"""
        return math.prod(range(2 * len(self.trees.taxa) - 5, 1, -2))

    def sample(self, key, sample_shape=()):
        """Draw topologies, of shape (*sample_shape, n - 2)."""
        if (held := self.trees.ways()[0]) < self.size:
            raise ValueError(f"The support holds {held} of {self.size} topologies; the prior cannot be drawn from.")
        return SubsplitBayesianNetwork(self.trees.uniform_logits(), self.trees).sample(key, sample_shape)

    @dist.util.validate_sample
    def log_prob(self, value):
        """Log-probability in nats."""
        return jnp.full(jnp.shape(value)[:-1], -math.log(self.size))
