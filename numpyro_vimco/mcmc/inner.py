# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""The inner kernel of :class:`.GuidedMCMC`: which one a model has by default, and how values are put into its state.

NumPyro's kernels hold the latents that HMC draws in unconstrained space, and all others as they are.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from numpyro.distributions import biject_to
from numpyro.distributions.constraints import Constraint
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import HMC, NUTS
from numpyro.infer.mcmc import MCMCKernel

from numpyro_vimco.control_flow import Given, is_in_scan
from numpyro_vimco.densities.enumeration import Unmarked
from numpyro_vimco.dependence import dependence
from numpyro_vimco.draws.approximation import Approximation
from numpyro_vimco.sites import Trace, bounds_of, is_discrete, is_marked, states, support_of

Values = dict[str, Array]


def default_kernel(approx: Approximation) -> MCMCKernel:
    """The inner kernel that follows from a model.

    Continuous latents move by NUTS; those of finitely many values 0, 1, … by Gibbs steps, one element after the other.
    All others move in global steps only; so do discrete ones of plates and chains with particles of their own.
    """
    from numpyro.infer.gibbs import CustomGibbs, DiscreteGibbs, Gibbs

    model, latents = _model(approx), approx.latents()
    of_levels = {name for level in approx.local for name in approx.latents_of(level)}
    continuous = [name for name, site in latents.items() if not is_discrete(site)]
    if len(continuous) == len(latents):
        return NUTS(model)
    others = [name for name in latents if name not in continuous]
    finite = [name for name in others if name not in of_levels and _counts_from_zero(latents[name])]
    rest = [name for name in others if name not in finite]
    blocks: list[tuple[MCMCKernel, Any]] = []
    if rest:
        blocks.append((CustomGibbs(_as_they_are), rest))
    if finite:
        blocks.append((DiscreteGibbs(model, modified=True), finite))
    return Gibbs([*blocks, (NUTS(model), None)])


def _model(approx: Approximation) -> Any:
    """The model at its own parameters, and without marks of sites that the guide samples."""
    model, params = approx.svi.model, {name: approx.params[name] for name in approx.params_of_model}
    marked = {name for name, site in approx.latents().items() if is_marked(site)}
    model = substitute(model, data=params) if params else model
    # Where sites share one dict `infer`, NumPyro's enumeration needs a copy for each: `Unmarked` makes them.
    return Unmarked(model, marked) if marked or approx.summed else model


def _counts_from_zero(site: dict) -> bool:
    """Whether its values are 0, 1, …, as `DiscreteGibbs` of NumPyro (0.22) takes them to be."""
    values = states(site["fn"])
    return len(values) > 0 and np.array_equal(values, np.arange(len(values)))


def _as_they_are(*, rng_key: Array, gibbs_sites: Values, hmc_sites: Values) -> Values:
    return gibbs_sites


def still_supports(approx: Approximation) -> dict[str, Constraint]:
    """The supports of continuous latents that do not depend on other latents."""
    latents, params = {name: site["value"] for name, site in approx.latents().items()}, approx.params

    def bounds(latents: Values) -> Values:
        model = Given(substitute(seed(approx.svi.model, jax.random.key(0)), data=params), latents)
        tr = trace(model).get_trace(*approx.args, **approx.kwargs)
        leaves = {name: bounds_of(support_of(tr[name]["fn"])) for name in latents}
        return {name: jnp.concatenate([jnp.ravel(x) for x in found]) for name, found in leaves.items() if found}

    moving = {name for name, sources in dependence(bounds, latents).items() if sources}
    supports = {n: support_of(site["fn"]) for n, site in approx.latents().items() if not is_discrete(site)}
    return {name: support for name, support in supports.items() if support is not None and name not in moving}


def sites_of_hmc(kernel: MCMCKernel, latents: Trace) -> frozenset[str]:
    """Names of the latents that a kernel holds in unconstrained space."""
    from numpyro.infer.gibbs import Gibbs

    if isinstance(kernel, HMC):
        return frozenset(latents)
    if not isinstance(kernel, Gibbs):
        return frozenset()
    found, rest = set[str](), dict(latents)
    # The block that takes what is left comes last.
    for block, names in sorted(kernel.blocks, key=lambda about: about[1] is None):
        own = list(rest) if names is None else list(names(latents) if callable(names) else names)
        found |= sites_of_hmc(block, {name: rest.pop(name) for name in own if name in rest})
    return frozenset(found)


def unconstrained(kernel: MCMCKernel, latents: Trace, values: Values, args: tuple, kwargs: dict) -> Values:
    """Some values in unconstrained space, by the supports that they have there.

    :param latents: the sites, for those inside of `scan`, whose supports do not move.
    :param values: of all latents.
    """
    tr = trace(substitute(seed(kernel.model, jax.random.key(0)), data=values)).get_trace(*args, **kwargs)
    return {
        name: biject_to((site if is_in_scan(site) else tr[name])["fn"].support).inv(values[name])
        for name, site in latents.items()
    }


def placed(kernel: MCMCKernel, state: Any, old: Values, new: Values, latents: Trace, args: tuple, kwargs: dict) -> Any:
    """The state of a kernel with new values of the latents, and with all that it keeps of them computed anew.

    :param old: the values that it has; where a site keeps these, its place in unconstrained space stays too.
    """
    from numpyro.infer.gibbs import Gibbs, with_conditioning

    if isinstance(kernel, Gibbs):
        blocks: list[Any] = []
        z: Values = {}
        for (block, _), of_block in zip(kernel.blocks, state.block_states):
            own = getattr(of_block, block.sample_field)
            siblings = {name: value for name, value in new.items() if name not in own}
            sites = {name: latents[name] for name in own}
            of_block = placed(block, of_block, old, new, sites, args, with_conditioning(kwargs, siblings))
            blocks.append(of_block)
            z |= getattr(of_block, block.sample_field)
        return state._replace(z=z, block_states=tuple(blocks))
    before = getattr(state, kernel.sample_field)
    there = {name: new[name] for name in before}
    if isinstance(kernel, HMC):
        there = unconstrained(kernel, {name: latents[name] for name in before}, new, args, kwargs)
    z = {
        name: jnp.where(jnp.all(old[name] == new[name]), value, there[name].astype(value.dtype))
        for name, value in before.items()
    }
    return kernel.refresh(state._replace(**{kernel.sample_field: z}), args, kwargs)
