# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Which latents of a model are coupled given the data, found from its log-densities.

Latents that share a factor of the joint density are neighbours in the posterior's graph. A guide that draws its sites
one after the other needs a coupling of a site to an earlier one if the two are neighbours, or are connected by a chain
of neighbours that are drawn later than both. Later sites are integrated out, which leaves their neighbours dependent;
earlier sites are given, which separates theirs.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from numpyro.handlers import block, seed, trace

from numpyro_vimco.control_flow import Given
from numpyro_vimco.dependence import dependence
from numpyro_vimco.sites import Trace, log_prob_at_value, sample_sites

Samples = dict[str, Array]


def log_densities(model: Callable, args: tuple, kwargs: dict) -> Callable[[Samples], Samples]:
    """A function from latents to the log-density of each sample site, in nats."""

    def evaluate(latents: Samples) -> Samples:
        with block():
            tr = trace(Given(seed(model, jax.random.key(0)), latents)).get_trace(*args, **kwargs)
        return {site["name"]: log_prob_at_value(site) for site in sample_sites(tr)}

    return evaluate


@dataclass(frozen=True)
class Graph:
    """The posterior's graph over latent sites.

    :ivar factors: for each sample site of the model, the latents that its log-density depends on.
    """

    factors: dict[str, set[str]]

    @classmethod
    def of(cls, evaluate: Callable[[Samples], Samples], latents: Samples) -> "Graph":
        """The graph of a model.

        :param evaluate: of :func:`log_densities`.
        """
        return cls(dependence(evaluate, latents))

    def parents(self, name: str, earlier: Iterable[str]) -> set[str]:
        """The sites among ``earlier`` that a site has to depend on; all other sites are drawn after it."""
        earlier, reached, todo = set(earlier), {name}, [name]
        while todo:
            site = todo.pop()
            for factor in self.factors.values():
                if site in factor:
                    new = factor - reached
                    reached |= new
                    todo.extend(new - earlier)
        return reached & earlier

    def is_coupled_within(self, name: str) -> bool:
        """Whether elements of a site may be dependent: whether another density than its own prior depends on it."""
        return any(name in factor for site, factor in self.factors.items() if site != name)


def local_plates(graph: Graph, tr: Trace, evaluate: Callable[[Samples], Samples], other: Samples) -> set[str]:
    """The plates whose elements are independent given the latents outside of the plate.

    :param tr: a trace of the model.
    :param evaluate: of :func:`log_densities`.
    :param other: other values of all latents.
    """
    frames = {site["name"]: {frame.name: frame.dim for frame in site["cond_indep_stack"]} for site in sample_sites(tr)}
    local = set()
    for plate in {plate for name in other for plate in frames[name]}:
        inside = {name for name in other if plate in frames[name]}
        if all(plate in frames[site] for site, factor in graph.factors.items() if factor & inside):
            dims = {name: found[plate] for name, found in frames.items() if plate in found}
            if _are_elements_independent(tr, evaluate, other, dims):
                local.add(plate)
    return local


def _are_elements_independent(tr: Trace, evaluate: Callable, other: Samples, dims: dict[str, int]) -> bool:
    """Whether the densities of half of a plate's elements stay the same if the others get other latents.

    A plate declares that its elements are independent, but a model may compute anything in it, a cumulative sum for
    example. Densities that depend on values that JAX traces cannot be compared, and pass.

    :param dims: of each sample site in the plate, the dimension of the plate.
    """

    def choose(is_other: np.ndarray, theirs: Array, ours: Array, axis: int) -> Array:
        return jnp.where(is_other[: ours.shape[axis]].reshape(-1, *(1,) * (-1 - axis)), theirs, ours)

    def densities(is_other: np.ndarray) -> Samples:
        values = {name: tr[name]["value"] for name in other}
        for name in dims.keys() & values.keys():
            values[name] = choose(is_other, other[name], values[name], dims[name] - tr[name]["fn"].event_dim)
        return evaluate(values)

    size = next(frame.size for name, dim in dims.items() for frame in tr[name]["cond_indep_stack"] if frame.dim == dim)
    half = np.random.default_rng(0).random(size) < 0.5
    ours, theirs, both = (densities(which) for which in (np.zeros(size, bool), np.ones(size, bool), half))
    for name, dim in dims.items():
        expected = choose(half, theirs[name], ours[name], dim)
        if not isinstance(expected, jax.core.Tracer):
            if not np.allclose(both[name], expected, rtol=1e-4, atol=1e-4, equal_nan=True):
                return False
    return True
