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
from numpyro.handlers import block, seed, substitute, trace

from numpyro_vimco.checks.independence import Sum, any_draw, anywhere, are_dependent
from numpyro_vimco.control_flow import Given
from numpyro_vimco.dependence import dependence
from numpyro_vimco.randomness import split
from numpyro_vimco.sites import Trace, is_latent_site, log_prob_at_value, sample_sites

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


def draws_anywhere(model: Callable, args: tuple, kwargs: dict, latents: Samples) -> Callable[[Array, Array], Samples]:
    """A function from a key, and whether to draw from the prior, to values that the posterior may have.

    :param latents: some values.
    """

    def draw(rng_key: Array, from_prior: Array) -> Samples:
        def choose(site: dict) -> Array | None:
            known = latents.get(site["name"])
            return None if known is None else anywhere(site, from_prior, known)

        with block():
            tr = trace(substitute(seed(model, rng_key), substitute_fn=choose)).get_trace(*args, **kwargs)
        return {name: tr[name]["value"] for name in latents}

    return draw


def local_plates(graph: Graph, tr: Trace, evaluate: Callable[[Samples], Samples], draw: Callable) -> set[str]:
    """The plates whose elements are independent given the latents outside of the plate.

    Densities that hold values that JAX traces cannot be compared, and pass.

    :param tr: a trace of the model.
    :param evaluate: of :func:`log_densities`.
    :param draw: of :func:`draws_anywhere`.
    """
    frames = {site["name"]: {frame.name: frame for frame in site["cond_indep_stack"]} for site in sample_sites(tr)}
    latents = [site["name"] for site in sample_sites(tr) if is_latent_site(site)]
    local: dict[str, int] = {}
    for plate in sorted({plate for name in latents for plate in frames[name]}):
        inside = {name for name in latents if plate in frames[name]}
        if all(plate in frames[site] for site, factor in graph.factors.items() if factor & inside):
            local[plate] = next(frames[name][plate].size for name in inside)

    def are_coupled(_: None, rng_key: Array, source: Array) -> dict[str, Array]:
        both = jax.lax.map(lambda key: draw(key, source == 0), split(rng_key))
        first, second = ({name: value[i] for name, value in both.items()} for i in range(2))
        found = {}
        for plate, size in local.items():
            inside = {name for name in frames if plate in frames[name]}
            axes = {name: frames[name][plate].dim - tr[name]["fn"].event_dim for name in inside.intersection(latents)}
            dims = {name: frames[name][plate].dim for name in inside}

            def densities(values: Samples, inside=inside) -> dict[str, Sum]:
                return {name: Sum.of(value) for name, value in evaluate(values).items() if name in inside}

            is_dependent = are_dependent(densities, first, second, axes, dims.__getitem__, size)
            found[plate] = jnp.stack(list(is_dependent.values())).any()
        return found

    found = any_draw(are_coupled, 2, max(local.values(), default=1))(None) if local else {}
    return {plate for plate in local if not (found and found[plate])}
