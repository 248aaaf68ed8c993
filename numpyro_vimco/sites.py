# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""What kinds of sites a trace has.

A *score-function site* is a latent guide site whose distribution has no reparameterised sampler
(``has_rsample`` is False): no gradient flows through its sample. All other latent guide sites are *path sites*;
:func:`is_drawn` tells which of them a doubly reparameterised gradient may treat as draws from a fixed density.
"""

import jax
from numpyro import distributions as dist
from numpyro.distributions import constraints

Trace = dict[str, dict]


def sample_sites(tr: Trace) -> list[dict]:
    """The sample sites of a trace."""
    return [site for site in tr.values() if site["type"] == "sample"]


def is_latent_site(site: dict) -> bool:
    """Whether ``site`` is latent."""
    return site["type"] == "sample" and not site["is_observed"]


def is_discrete(site: dict) -> bool:
    """Whether a site is discrete; one that does not know is."""
    try:
        return site["fn"].support.is_discrete
    except NotImplementedError:
        return True


def is_score_function_site(site: dict) -> bool:
    """Whether ``site`` is latent and its distribution has no reparameterised sampler.

    A discrete distribution or a mixture never has one, whatever its ``has_rsample`` says: that is True by default
    for a distribution without ``arg_constraints``, which mixtures were before NumPyro 0.22.
    """
    if not is_latent_site(site):
        return False
    fn = site["fn"]
    if not fn.has_rsample or getattr(fn.support, "is_discrete", False):
        return True
    return any(isinstance(base, (dist.MixtureSameFamily, dist.MixtureGeneral)) for base in _base_distributions(fn))


def is_drawn(site: dict) -> bool:
    """Whether ``site`` is latent, and has a density that a doubly reparameterised gradient may hold fixed.

    The others are functions of the parameters and of noise, with plain gradients: Delta; distributions whose support
    may move with a parameter, for which the score does not have mean zero; masked ones, which have no score.
    """
    if not is_latent_site(site):
        return False
    if is_score_function_site(site):
        return True
    bases = _base_distributions(site["fn"])
    transformed = any(isinstance(base, dist.TransformedDistribution) for base in bases)
    return not (
        isinstance(bases[-1], dist.Delta)
        or any(isinstance(base, dist.MaskedDistribution) for base in bases)
        or any(isinstance(leaf, jax.Array) for base in bases for leaf in jax.tree.leaves(base.support))
        or (transformed and not _is_real(bases[-1].support))
    )


def _is_real(support: constraints.Constraint) -> bool:
    return getattr(support, "base_constraint", support) in (constraints.real, constraints.real_vector)


def unwrapped(fn: dist.Distribution) -> dist.Distribution:
    """A distribution without what only reshapes or masks it."""
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def _base_distributions(fn: dist.Distribution) -> list[dist.Distribution]:
    """A distribution and those that it wraps."""
    found = [fn]
    while hasattr(found[-1], "base_dist"):
        found.append(found[-1].base_dist)
    return found
