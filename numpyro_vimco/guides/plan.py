# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""The order in which a structured guide draws its sites, and what each depends on. For reasons see `AutoMixed`."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from numpyro.infer.autoguide import AutoNormal
from numpyro.primitives import CondIndepStackFrame

from numpyro_vimco.families.autoregressive import Elements
from numpyro_vimco.families.bounds import has_total
from numpyro_vimco.families.components import Components
from numpyro_vimco.families.couplings import Graph
from numpyro_vimco.families.families import Boolean, Family, Interval, has_common_bounds
from numpyro_vimco.guides.structured import ContinuousSite, DiscreteSite, Samples, Site
from numpyro_vimco.private.of_numpyro import init_locs, init_scale, unconstrained_event_dim
from numpyro_vimco.sites import Trace, is_latent_site

# `gated` looks at discrete sites of so many values, and at so many pairs of sites, at most.
MAX_VALUES, MAX_PAIRS = 8, 64


def discrete_sites(tr: Trace, families: dict[str, Family], starts: dict[str, Samples]) -> list[Site]:
    """Discrete sites that depend on nothing."""
    sites: list[Site] = []
    for name, family in families.items():
        event_dim = tr[name]["fn"].event_dim
        elements = Elements(jnp.ndim(tr[name]["value"]) - event_dim, event_dim, ())
        sites.append(
            DiscreteSite(
                name=name,
                site=tr[name],
                start=starts[name],
                event_dim=event_dim,
                elements=elements,
                family=family,
                has_total=has_total(tr[name]["fn"].support),
            )
        )
    return sites


def continuous_sites(
    guide: AutoNormal, units: dict[str, tuple[Array, Array]], components: Mapping[str, Components]
) -> list[Site]:
    """The sites of a guide of NumPyro, which depend on nothing.

    :param units: of each site, location and scale of its prior in unconstrained space.
    :param components: of sites that have several mixture components.
    """
    sites: list[Site] = []
    for name, site in guide.prototype_trace.items():
        if is_latent_site(site):
            loc, event_dim = init_locs(guide)[name], unconstrained_event_dim(guide, name)
            centre, unit = units[name]
            elements = Elements(jnp.ndim(loc) - event_dim, event_dim, ())
            sites.append(
                ContinuousSite(
                    name=name,
                    site=site,
                    start={"loc": loc, "scale": init_scale(guide) * unit},
                    event_dim=event_dim,
                    elements=elements,
                    centre=centre,
                    unit=unit,
                    components=components.get(name),
                )
            )
    return sites


def begun_anew(sites: Iterable[Site], guide: AutoNormal) -> list[Site]:
    """Sites that begin where a guide of NumPyro does now."""
    locs = init_locs(guide)
    return [replace(s, start={**s.start, "loc": locs[s.name]}) if s.name in locs else s for s in sites]


def conditional(sites: Iterable[Site]) -> list[Site]:
    """Let continuous sites depend on the discrete sites all of whose plates they are in."""
    sites = list(sites)
    discrete = [site for site in sites if isinstance(site, DiscreteSite)]

    def given_discrete(site: Site) -> Site:
        if isinstance(site, ContinuousSite):
            return replace(site, own=tuple(other.name for other in discrete if plates(other) <= plates(site)))
        return site

    return [given_discrete(site) for site in sites]


def steps_of(chain: str) -> str:
    """The name of the plate that the steps of a chain are for a guide: they are drawn independently."""
    return f"_steps_of_{chain}"


def in_steps(sites: Iterable[Site], homes: Mapping[str, str]) -> list[Site]:
    """Sites of chains in a plate of its steps.

    :param homes: the chain of each latent in one.
    :raises ValueError: for a chain whose latents are in different plates.
    """
    found: list[Site] = []
    dims: dict[str, int] = {}
    for site in sites:
        if chain := homes.get(site.name):
            shape = site.full_shape
            dim = -site.elements.batch_ndim
            if dims.setdefault(chain, dim) != dim:
                raise ValueError(
                    f"The latents of the chain of '{chain}' are in different plates. Its guide draws the latents of "
                    "one step together: give them the same plates inside of the `scan`, or write the guide by hand."
                )
            frame = CondIndepStackFrame(steps_of(chain), dim, shape[0])
            stack = [*site.site["cond_indep_stack"], frame]
            site = replace(site, site={**site.site, "cond_indep_stack": stack})
        found.append(site)
    return found


def autoregressive(
    sites: Iterable[Site], graph: Graph, local: set[str], bounded_by: Mapping[str, frozenset[str]]
) -> list[Site]:
    """Each site depends on those before it that the model couples it to.

    The order: sites that are in fewer local plates first; among these, discrete ones first. A site comes after those
    that its support depends on.

    :param bounded_by: these, by site.
    """
    order = sorted(conditional(sites), key=lambda site: (len(plates(site) & local), isinstance(site, ContinuousSite)))
    result: list[Site] = []
    while order:
        drawn = {site.name for site in result}
        site = next(site for site in order if bounded_by.get(site.name, frozenset()) <= drawn)
        order.remove(site)
        parents = graph.parents(site.name, (other.name for other in result))
        dims = tuple(frame.dim for frame in site.site["cond_indep_stack"] if frame.name in local)
        reached = [other for other in result if plates(other) & local <= plates(site) & local]
        site = replace(
            site,
            elements=replace(site.elements, local_dims=dims),
            coupled=tuple(other.name for other in reached if other.name in parents),
            has_moving_support=site.name in bounded_by,
            # A mixture has no couplings of its elements.
            is_coupled_within=getattr(site, "components", None) is None and graph.is_coupled_within(site.name),
        )
        if isinstance(site, ContinuousSite):
            own = tuple(name for name in site.own if name in parents)
            # Own sites all of whose plates are local: an element reaches one element of these, its own already.
            whole = {other.name for other in reached if other.name in own and plates(other) <= local}
            coupled = tuple(name for name in site.coupled if name not in whole)
            site = replace(site, own=own, coupled=coupled, prior=frozenset(graph.factors[site.name] - {site.name}))
        result.append(site)
    return result


def gated(
    sites: Iterable[Site],
    evaluate: Callable[[Samples], Samples],
    values: Samples,
    make_other: Callable[[], Samples],
) -> list[Site]:
    """Find for which values of a discrete site a continuous one in the same plates has no effect on other densities.

    There its posterior is its prior, and it is coupled to no other site.

    :param evaluate: from latents to the log-density of each site of the model.
    :param values: of all latents.
    :param make_other: makes other values of all latents.
    """
    sites = list(sites)
    discrete = [site for site in sites if isinstance(site, DiscreteSite)]
    continuous = [site for site in sites if isinstance(site, ContinuousSite)]
    pairs = [(site, by) for site in continuous for by in discrete if by.name in site.own and _is_alike(by, site)]
    if not pairs or len(pairs) > MAX_PAIRS:
        return sites
    other = make_other()
    tables: dict[str, dict[str, np.ndarray]] = {}
    for site, by in pairs:
        has_effect = []
        assert isinstance(by.family, Boolean | Interval)
        present = values[by.name]
        for value in range(by.family.low, by.family.low + by.family.num_values):
            switched = {**values, by.name: jnp.asarray(np.full(present.shape, value, present.dtype))}
            before, after = evaluate(switched), evaluate({**switched, site.name: other[site.name]})
            has_effect.append(any(_differ(before[name], after[name]) for name in after if name != site.name))
        if not all(has_effect):
            tables.setdefault(site.name, {})[by.name] = np.array(has_effect, float)
    return [replace(s, gates=tables.get(s.name, {})) if isinstance(s, ContinuousSite) else s for s in sites]


def _differ(a: Array, b: Array) -> bool:
    """Whether values differ; True for values that JAX traces, as they may."""
    if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return True
    return not np.array_equal(a, b, equal_nan=True)


def _is_alike(by: DiscreteSite, site: ContinuousSite) -> bool:
    """Whether ``by`` is a discrete site of few values in the plates of ``site``, with one value for each element."""
    family = by.family
    if not isinstance(family, Boolean | Interval) or family.num_values > MAX_VALUES:
        return False
    shape, other = site.full_shape, by.full_shape
    return has_common_bounds(family) and plates(by) == plates(site) and shape[: len(other)] == other


def plates(site: Site) -> set[str]:
    """The names of a site's plates."""
    return {frame.name for frame in site.site["cond_indep_stack"]}
