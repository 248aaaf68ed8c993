# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

r"""Distributions of one site whose elements depend on those before them.

Each element has a density given the elements before it. The log-density has the shape that it has for independent
elements, so that the site fits into the same plates; its sum over elements is that of all elements jointly.
"""

from collections.abc import Callable
from dataclasses import dataclass
import math
from typing import Any

import jax
from jax import lax, random
import jax.numpy as jnp
from jaxtyping import Array
import numpyro.distributions as dist
from numpyro.distributions import constraints

from numpyro_vimco.randomness import split

# Systems of so many equations are solved one equation after the other; larger ones by halves.
LOOP = 32
# Blocks into which elements are dealt out whose couplings are of low rank.
NUM_BLOCKS = 8


@dataclass(frozen=True)
class Elements:
    """The order in which the elements of a site are drawn.

    Elements of local plates are drawn side by side; for each of them, those along all other dimensions are drawn one
    after the other, in row-major order.

    :ivar batch_ndim: number of batch dimensions of the site's values.
    :ivar event_dim: number of event dimensions.
    :ivar local_dims: batch dimensions of local plates, negative.
    """

    batch_ndim: int
    event_dim: int
    local_dims: tuple[int, ...]

    @property
    def _order(self) -> list[int]:
        local = [self.batch_ndim + dim for dim in sorted(self.local_dims)]
        return local + [i for i in range(self.batch_ndim + self.event_dim) if i not in local]

    def _local_shape(self, shape: tuple[int, ...]) -> list[int]:
        deepest = min(self.local_dims, default=0)
        return [shape[self.batch_ndim + dim] if dim in self.local_dims else 1 for dim in range(deepest, 0)]

    def count(self, shape: tuple[int, ...]) -> int:
        """The number n of elements that are drawn one after the other, of values of shape ``(*batch, *event)``."""
        return math.prod(shape) // math.prod(self._local_shape(shape))

    def gather(self, x: Any) -> Any:
        """From shape ``(*batch, *event, *rest)`` to ``(*local, n, *rest)``; an array of NumPy gives one of NumPy.

        ``local`` has the batch dimensions from the leftmost local one on; those that are not local have size 1.
        """
        ndim = self.batch_ndim + self.event_dim
        moved = x.transpose(*self._order, *range(ndim, x.ndim))
        return moved.reshape(*self._local_shape(x.shape), -1, *x.shape[ndim:])

    def scatter(self, x: Array, shape: tuple[int, ...]) -> Array:
        """The reverse: from ``(*local, n, *rest)`` to ``(*shape, *rest)``, with shape ``(*batch, *event)``. Local
        dimensions of size 1 are repeated.
        """
        local, order = self._local_shape(shape), self._order
        rest = x.shape[len(local) + 1 :]
        x = jnp.broadcast_to(x, (*local, *x.shape[len(local) :])).reshape(*(shape[i] for i in order), *rest)
        return x.transpose(*(order.index(i) for i in range(len(order))), *range(len(order), x.ndim))


class FullCoupling:
    """Couplings of each element to all before it, by a matrix.

    :param matrix: of shape ``(*local, n, k, n, f)``: from f features of an element to k shifts of a later one. Entries
        on and above the diagonal of the two n are not used.
    """

    def __init__(self, matrix: Array):
        n = matrix.shape[-2]
        below = jnp.arange(n)[:, None] > jnp.arange(n)
        self.matrix = jnp.where(below[:, None, :, None], matrix, 0)

    def apply(self, features: Array) -> Array:
        """From features ``(*local, n, f)`` to shifts ``(*local, n, k)``."""
        return jnp.einsum("...ikjf,...jf->...ik", self.matrix, features)

    def solve(self, right: Array, gate: Array) -> Array:
        """The u of shape ``(*local, n)`` that solves u = right + gate · apply(gate · u), for k = f = 1."""
        matrix = gate[..., :, None] * self.matrix[..., 0, :, 0] * gate[..., None, :]
        # Not by `solve_triangular`: two of them at a time can wait for each other without end, where JAX has as few
        # threads (seen in JAX 0.10.1 on two cores).
        return jax.lax.custom_linear_solve(
            lambda u: u - jnp.einsum("...ij,...j->...i", matrix, u),
            right,
            lambda _, right: _substitute(matrix, right),
            lambda _, right: _substitute(matrix.swapaxes(-2, -1)[..., ::-1, ::-1], right[..., ::-1])[..., ::-1],
        )


def _substitute(matrix: Array, right: Array) -> Array:
    """The u of shape ``(*local, n)`` with u = right + matrix · u, for a matrix that is zero from its diagonal on."""
    n = right.shape[-1]
    if n > LOOP:
        first = _substitute(matrix[..., : n // 2, : n // 2], right[..., : n // 2])
        known = jnp.einsum("...ij,...j->...i", matrix[..., n // 2 :, : n // 2], first)
        return jnp.concatenate([first, _substitute(matrix[..., n // 2 :, n // 2 :], right[..., n // 2 :] + known)], -1)

    def row(i: Array, u: Array) -> Array:
        return u.at[..., i].add(jnp.sum(jax.lax.dynamic_index_in_dim(matrix, i, -2, keepdims=False) * u, -1))

    return jax.lax.fori_loop(1, n, row, right)


class LowRankCoupling:
    """Couplings of elements to those before them, by a product of two matrices.

    Elements are dealt out to 8 blocks in turn, and coupled to all elements of the blocks before their own. These are
    88% of all pairs of elements, neighbours among them. So there are 8 steps, whatever the number of elements.

    :param left: of shape ``(*local, n, k, rank)``.
    :param right: of shape ``(n, f, rank)``.
    """

    def __init__(self, left: Array, right: Array):
        self.num_blocks = min(NUM_BLOCKS, right.shape[0])
        self.left, self.right = self._deal(left, 2), self._deal(right, 2)

    def _deal(self, x: Array, rest: int) -> Array:
        """From ``(*local, n, *rest)`` to ``(*local, blocks, elements of a block, *rest)``, with zeros at the end.

        :param rest: number of the dimensions ``*rest``.
        """
        axis = x.ndim - rest - 1
        missing = -x.shape[axis] % self.num_blocks
        x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
        return x.reshape(*x.shape[:axis], -1, self.num_blocks, *x.shape[axis + 1 :]).swapaxes(axis, axis + 1)

    def _collect(self, x: Array, rest: int, n: int) -> Array:
        """The reverse."""
        axis = x.ndim - rest - 2
        x = x.swapaxes(axis, axis + 1).reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
        return jax.lax.slice_in_dim(x, 0, n, axis=axis)

    def apply(self, features: Array) -> Array:
        """As :class:`FullCoupling`."""
        of_blocks = jnp.einsum("bmfr,...bmf->...br", self.right, self._deal(features, 1))
        earlier = jnp.tri(self.num_blocks, k=-1)
        before = jnp.einsum("bc,...cr->...br", earlier, of_blocks)
        return self._collect(jnp.einsum("...bmkr,...br->...bmk", self.left, before), 1, features.shape[-2])

    def solve(self, right: Array, gate: Array) -> Array:
        """As :class:`FullCoupling`."""
        shape = right.shape
        right, gate = (self._deal(x, 0) for x in (right, jnp.broadcast_to(gate, shape)))
        left = jnp.broadcast_to(self.left[..., 0, :], (*right.shape, self.left.shape[-1]))

        def step(before, block):
            right, gate, left, weights = block
            u = right + gate * jnp.einsum("...mr,...r->...m", left, before)
            return before + jnp.einsum("mr,...m->...r", weights, gate * u), u

        blocks = (
            jnp.moveaxis(right, -2, 0),
            jnp.moveaxis(gate, -2, 0),
            jnp.moveaxis(left, -3, 0),
            self.right[..., 0, :],
        )
        _, u = lax.scan(step, jnp.zeros((*shape[:-1], left.shape[-1])), blocks)
        return self._collect(jnp.moveaxis(u, 0, -2), 0, shape[-1])


Coupling = FullCoupling | LowRankCoupling


class AutoregressiveDiscrete(dist.Distribution):
    """
    Discrete elements, each with a distribution that depends on those before it.

    :param conditional: from values ``(*local, n)`` to the distribution of each element given those before it.
    :param elements: the order of elements.
    :param support: the support of each element.
    :param start: any values, of shape ``(*local, n)``.
    :param shape: shape of values, ``(*batch, *event)``; the distribution has no event dimensions.
    """

    pytree_data_fields = ("_support",)
    pytree_aux_fields = ("conditional", "elements", "start")
    has_rsample = False

    def __init__(self, conditional: Callable[[Array], dist.Distribution], elements: Elements, support, start, shape):
        self.conditional, self.elements, self._support, self.start = conditional, elements, support, start
        super().__init__(batch_shape=shape)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self):
        """The support of each element."""
        return self._support

    def sample(self, key, sample_shape=()):
        """Draw values of shape ``(*sample_shape, *batch)``.

        All elements are drawn from the same noise, given the values of the pass before, until no value changes. The
        first element is right after one pass, the second after two at most, and so on: the result is that of drawing
        one element after the other. [1]

        1. Song et al. 2021, *Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving*,
           arXiv 2002.03629
        """
        draw: Callable[[Array], Array] = self._sample
        for _ in sample_shape:
            draw = jax.vmap(draw)
        return draw(split(key, sample_shape) if sample_shape else key)

    def sample_rest(self, key: Array, value: Array, kept: Array) -> Array:
        """Draw the elements after those that are kept, given these.

        :param value: of shape ``batch``.
        :param kept: of the same shape: whether each element keeps its value. Kept elements come before the others.
        """
        return self._sample(key, self.elements.gather(value), self.elements.gather(kept))

    def _sample(self, key: Array, value: Array | int = 0, kept: Array | bool = False) -> Array:
        # No draw has a derivative. JAX 0.10 fails in the second derivative of a loop that closes over parameters.
        of_pass, held = jax.closure_convert(lambda values: self.conditional(values).sample(key), self.start)
        held = lax.stop_gradient(held)

        def improve(state):
            values, _, passes = state
            new = jnp.where(kept, value, of_pass(values, *held))
            return new, jnp.any(new != values), passes + 1

        def is_unfinished(state):
            _, is_new, passes = state
            return is_new & (passes < self.start.shape[-1])

        values, *_ = lax.while_loop(is_unfinished, improve, (self.start, jnp.array(True), 0))
        return self.elements.scatter(values, self.batch_shape)

    def log_prob(self, value):
        """Log-probability of each element given those before it, in nats."""
        values = self.elements.gather(value)
        return self.elements.scatter(self.conditional(values).log_prob(values), jnp.shape(value))


class AutoregressiveNormal(dist.Distribution):
    r"""
    Normal elements, each with a mean that is linear in those before it: with :math:`e_i = (u_i - loc_i) / unit_i`,
    :math:`e_i \sim \mathrm{Normal}(shift_i + g_i \sum_{j<i} C_{ij} g_j e_j, \; scale_i)`.

    :param loc: where e is 0, of shape ``(*local, n)``.
    :param unit: the unit of e, of the same shape.
    :param shift: mean of e given that all earlier e are 0, of the same shape.
    :param scale: standard deviation of e given the earlier elements, of the same shape.
    :param gate: g, of the same shape.
    :param coupling: C.
    :param elements: the order of elements.
    :param shape: shape of values, ``(*batch, *event)``; the distribution has no event dimensions.
    """

    pytree_data_fields = ("loc", "unit", "shift", "scale", "gate")
    pytree_aux_fields = ("coupling", "elements")
    support = constraints.real
    has_rsample = True

    def __init__(self, loc, unit, shift, scale, gate: Array, coupling: Coupling, elements: Elements, shape):
        self.loc, self.unit, self.shift, self.scale, self.gate = loc, unit, shift, scale, gate
        self.coupling, self.elements = coupling, elements
        super().__init__(batch_shape=shape)

    def sample(self, key, sample_shape=()):
        """Draw values of shape ``(*sample_shape, *batch)``, differentiable."""

        def draw(noise: Array) -> Array:
            return self._at(self.elements.gather(noise))

        for _ in sample_shape:
            draw = jax.vmap(draw)
        return draw(random.normal(key, sample_shape + self.batch_shape))

    def sample_rest(self, key: Array, value: Array, kept: Array) -> Array:
        """As of :class:`AutoregressiveDiscrete`."""
        e, mean = self._standardized(value)
        noise = self.elements.gather(random.normal(key, self.batch_shape))
        return self._at(jnp.where(self.elements.gather(kept), (e - mean) / self.scale, noise))

    def _at(self, noise: Array) -> Array:
        """Values of standard normal noise of shape ``(*local, n)``."""
        e = self.coupling.solve(self.shift + self.scale * noise, self.gate)
        return self.elements.scatter(self.loc + self.unit * e, self.batch_shape)

    def _standardized(self, value: Array) -> tuple[Array, Array]:
        """The e of values, and their means given earlier ones."""
        e = (self.elements.gather(value) - self.loc) / self.unit
        return e, self.shift + self.gate * self.coupling.apply((self.gate * e)[..., None])[..., 0]

    def log_prob(self, value):
        """Log-density of each element given those before it, in nats."""
        e, mean = self._standardized(value)
        log_prob = dist.Normal(mean, self.scale).log_prob(e) - jnp.log(self.unit)
        return self.elements.scatter(log_prob, jnp.shape(value))


def sample_rest(fn: dist.Distribution, key: Array, value: Array, chosen: Array) -> Array:
    """Draw the elements of a distribution that depend on chosen ones, given these and the others.

    These are the later elements of a distribution of this module; there are none of another.

    :param value: of shape ``(*batch, *event)``.
    :param chosen: of shape ``batch``.
    """
    base = fn
    transforms: list[dist.transforms.Transform] = []
    while not isinstance(base, AutoregressiveDiscrete | AutoregressiveNormal):
        if not hasattr(base, "base_dist"):
            return value
        transforms += base.transforms[::-1] if isinstance(base, dist.TransformedDistribution) else []
        base = base.base_dist
    inner = value
    for transform in transforms:
        inner = transform.inv(inner)
    elements = base.elements
    expanded = jnp.broadcast_to(chosen.reshape(*chosen.shape, *(1,) * elements.event_dim), base.batch_shape)
    is_chosen = elements.gather(expanded)
    until = jnp.flip(jnp.cumsum(jnp.flip(is_chosen, -1), axis=-1), -1) > 0
    kept = elements.scatter(until | ~is_chosen.any(-1, keepdims=True), base.batch_shape)
    new = base.sample_rest(key, inner, kept)
    for transform in reversed(transforms):
        new = transform(new)
    # Kept values come back as they were, not as far as a transform inverts itself.
    kept = kept.all(tuple(range(chosen.ndim, kept.ndim)))
    return jnp.where(kept.reshape(*kept.shape, *(1,) * (value.ndim - kept.ndim)), value, new)
