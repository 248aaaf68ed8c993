# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Which models have sites that can be summed out: errors where enumeration would be silently wrong, or too large.

A summed site has all its values along a dimension of its own, and size 1 along its plates. So what combines elements of
its plates (a sum, an index) computes something else. A site outside of a plate can therefore not depend on a summed one
inside of it.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from numpyro_vimco.control_flow import is_in_scan
from numpyro_vimco.sites import Trace, sample_sites, states

# Entries of the largest table of one particle: a gigabyte in single precision.
MAX_ENTRIES = 2**28


def check_summed(model_trace: Trace, summed: Collection[str], parents: Mapping[str, Collection[str]]) -> None:
    """Raise unless sites can be summed out.

    :param model_trace: of the model as it is, with some value for each summed site.
    :param summed: names of the summed sites.
    :param parents: for each site, the summed sites that its log-density depends on at given values of all sites.
    :raises ValueError: naming the site, and the plate.
    """
    sizes = {name: _check_support(model_trace[name]) for name in summed}
    for site in sample_sites(model_trace):
        name, depends = site["name"], parents[site["name"]]
        own = unexplained_dims(site)
        if depends and own:
            raise ValueError(
                f"Site '{name}' has batch dimensions of sizes {own} that no plate explains, and depends on "
                f"'{min(depends)}', which is summed out (infer={{'enumerate': 'parallel'}}). Put it into a plate of "
                "each such size, or declare the dimensions by `.to_event()`."
            )
        stack = {frame.name for frame in site["cond_indep_stack"]}
        for other in depends:
            missing = {frame.name for frame in model_trace[other]["cond_indep_stack"]} - stack
            if missing:
                raise outside_error(name, other, min(missing))
            if is_in_scan(model_trace[other]) and not is_in_scan(site):
                raise outside_error(name, other, None)
        batch = math.prod(frame.size for frame in site["cond_indep_stack"])
        entries = batch * math.prod(sizes[other] for other in depends)
        if entries > MAX_ENTRIES:
            values = ", ".join(f"{sizes[other]:,} of '{other}'" for other in sorted(depends))
            raise ValueError(
                f"The log-density of site '{name}' at all values of the sites to be summed out ({values}) is a table "
                f"of {entries:,} numbers for each particle; {MAX_ENTRIES:,} are admitted. Mark fewer sites by "
                "infer={'enumerate': 'parallel'}, and let the guide sample the others."
            )


def outside_error(site: str, summed: str, plate: str | None) -> ValueError:
    """A site that combines elements of a site that is summed out for each element; ``plate`` is None for `scan`."""
    where = "`scan`" if plate is None else f"the plate '{plate}'"
    return ValueError(
        f"Site '{site}' depends on '{summed}', which is summed out, but is outside of {where} that '{summed}' is in: a "
        "sum over all values of all its elements at once is what it would take. Move the site inside, or remove the "
        f"mark infer={{'enumerate': 'parallel'}} of '{summed}', and let the guide sample it."
    )


def table_error(site: str, summed: Iterable[str]) -> ValueError:
    """A site whose density where others are summed out is not that at the same values drawn."""
    return ValueError(
        f"Site '{site}' has another density where {' and '.join(map(repr, sorted(summed)))} is summed out "
        "than where it is drawn: the model combines or indexes elements of a plate (a sum, a shift, `z[index]`), but a "
        "summed site has its values along a dimension of its own, and size 1 along its plates; or it goes back further "
        "in a chain than `history` says. Remove the mark infer={'enumerate': 'parallel'}, and let the guide sample "
        "these sites."
    )


def crossed_error(summed: Iterable[str]) -> ValueError:
    """Summed sites in plates that cross, all of which an observed site depends on."""
    return ValueError(
        f"The sites {_quoted(summed)} cannot be summed out together: they are in plates that cross, and the sum over "
        "all of them grows exponentially with the plates' sizes. Leave the mark, infer={'enumerate': 'parallel'}, to "
        "those of one plate, and let the guide sample the others."
    )


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names)))


def masked_sum_error(site: str, summed: str, num_states: int) -> ValueError:
    """A density that is not masked and depends on elements of a summed site that are."""
    return ValueError(
        f"Site '{summed}' is summed out, and masked where the density of site '{site}' depends on it. Its own "
        "probabilities would still weight that sum here, and no probabilities in NumPyro's NUTS. Write which you mean, "
        f"without a mask: the site as it is, and no `factor` that adds its density again; or, if its density is not to "
        f"count, equal probabilities: dist.Categorical(logits=jnp.zeros({num_states}))."
    )


def check_parents(parents: Mapping[str, Collection[str]], found: Mapping[str, Collection[str]]) -> None:
    """Raise unless each site's table has a dimension for each summed site that its density depends on.

    :param parents: for each site, the summed sites that its density depends on.
    :param found: those whose values are along dimensions of its table.
    :raises ValueError: naming the site.
    """
    for name, depends in parents.items():
        missing = set(depends) - set(found.get(name, ()))
        if missing:
            raise table_error(name, missing)


def check_enumerated(enumerated: Trace, summed: Iterable[str]) -> None:
    """Raise unless each summed site has a dimension for its values.

    :raises NotImplementedError: otherwise: inside of control flow that NumPyro does not enumerate.
    """
    for name in summed:
        site = enumerated.get(name, enumerated.get(f"_PREV_{name}"))
        if site is None or site["name"] not in site["infer"]["dim_to_name"].values():
            raise NotImplementedError(
                f"Site '{name}' is marked infer={{'enumerate': 'parallel'}}, but NumPyro cannot enumerate it where it "
                "is: inside of `cond`, or of `scan` with history=0. Write it in a plate, in `scan` with history=1 or "
                "more, or in a loop over `numpyro.contrib.funsor.markov`."
            )


def check_group(
    group: Iterable[dict], summed: Collection[str], level_of: Callable[[dict], str | None], scale_of: Callable
) -> tuple[str | None, Any]:
    """The level and the scale that sites have in common which are connected by summed sites.

    :raises ValueError: if they have several.
    """
    group = list(group)
    names = ", ".join(repr(name) for name in summed)
    scales = [scale_of(site) for site in group]
    if any(scale is not None and not isinstance(scale, float | int) for scale in scales):
        raise ValueError(
            f"Sites that depend on summed ones ({names}) have a scale that is an array. It multiplies the logarithm of "
            "their sum, so that it must be one number: `numpyro.handlers.scale(scale=0.5)`."
        )
    if len({1.0 if scale is None else round(scale, 6) for scale in scales}) > 1:
        by_site = ", ".join(f"{1 if scale is None else scale:.6g} of '{s['name']}'" for s, scale in zip(group, scales))
        raise ValueError(
            f"Sites that are connected by summed ones ({names}) have different scales ({by_site}), by a subsampled "
            "plate that not all of them are in, or by `handlers.scale`. A scale multiplies the logarithm of their sum: "
            "give all the same, use the full plate, or let the guide sample the summed site."
        )
    levels = {level_of(site) for site in group}
    if len(levels) > 1:
        plate = next(level for level in levels if level is not None)
        raise ValueError(
            f"Sites inside and outside of the plate '{plate}' are connected by summed ones ({names}), but with "
            f"`plate_particles` each element of '{plate}' has particles of its own. Remove the plate from "
            "`plate_particles`, or let the guide sample the summed site that is outside of it."
        )
    return levels.pop(), scales[0]


def _check_support(site: dict) -> int:
    """The number of values of a summed site: NumPyro's enumeration takes them to be 0, 1, …

    :raises ValueError: for a site in batch dimensions that no plate explains, and for a support with other values.
    """
    name, own = site["name"], unexplained_dims(site)
    if own:
        raise ValueError(
            f"Site '{name}' is marked infer={{'enumerate': 'parallel'}}, but has batch dimensions of sizes {own} that "
            "no plate explains, so that its elements would be summed out together. Put it into a plate of each such "
            "size."
        )
    values = states(site["fn"])
    if not np.array_equal(values, np.arange(max(values.size, 1))):
        raise ValueError(
            f"Site '{name}' is marked infer={{'enumerate': 'parallel'}}, but its values are not known to be 0, 1, …, "
            "as NumPyro's enumeration takes them to be. Write it as dist.Categorical, and compute the value that it "
            f"stands for: value = values[numpyro.sample('{name}', …)]."
        )
    return values.size


def unexplained_dims(site: dict) -> list[int]:
    """Sizes of the batch dimensions of a site's log-density that are not those of its plates or, in `scan`, time."""
    batch = _batch_shape(site)
    plates = {frame.dim for frame in site["cond_indep_stack"]}
    return [size for dim, size in zip(range(-len(batch), 0), batch) if size != 1 and dim not in plates]


def num_batch_dims(model_trace: Trace) -> int:
    """The largest number of dimensions that the log-density of a site has, without time."""
    return max(len(_batch_shape(site)) for site in sample_sites(model_trace))


def log_prob_shape(site: dict) -> tuple[int, ...]:
    """The shape of a site's log-density, with a leading dimension for time in `scan`."""
    value = jnp.shape(site["value"])
    return jnp.broadcast_shapes(site["fn"].batch_shape, value[: len(value) - site["fn"].event_dim])


def _batch_shape(site: dict) -> tuple[int, ...]:
    shape = log_prob_shape(site)
    return shape[1:] if is_in_scan(site) else shape
