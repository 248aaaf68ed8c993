# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Priors of users: do their draws have the support that they declare?

Automatic guides believe the support of a prior. Where it is wrong, a guide proposes values that the prior never has, or
never proposes some that it has, and nothing that it draws shows it. Most of NumPyro's own
are right, and are not looked at.
"""

from collections.abc import Iterator

import jax
import numpy as np
import numpyro.distributions as dist

from numpyro_vimco.sites import base_distributions, is_discrete, is_of_numpyro, support_leaves, support_of

# Number of draws; and how many of them have to be wrong, as values may be rounded to a bound, or to each other.
DRAWS, WRONG = 100, 5
MAX_ELEMENTS = 1000  # of a site's batch, that are looked at
INTEGERS = 2.0**22  # beyond, numbers of single precision are all integers


def check_has_support(site: dict) -> None:
    """Raise for a latent whose prior is a user's and declares no support.

    :raises ValueError: naming the site.
    """
    own = _of_users(site["fn"])
    if own and support_of(site["fn"]) is None:
        raise ValueError(
            f"The prior of site '{site['name']}', {own[0]}, has no support, so that no automatic guide knows its "
            "values. Declare it in the class: `support = constraints.real`, or what fits, of numpyro.distributions."
        )


def check_draws(site: dict) -> None:
    """Raise for a latent whose prior has other draws than its support says; at concrete parameters.

    Looked at are distributions of users, and continuous ones that transform discrete ones.

    :raises ValueError: naming the site.
    """
    name, fn, support = site["name"], site["fn"], support_of(site["fn"])
    bases = [support_of(base) for base in base_distributions(fn)]
    is_mixed = not is_discrete(site) and any(base is not None and base.is_discrete for base in bases)
    if support is None or not (is_mixed or _of_users(fn)):
        return
    try:
        draws = fn.sample(jax.random.key(0), (DRAWS,))
    except NotImplementedError:  # a density without a sampler
        return
    if any(isinstance(leaf, jax.core.Tracer) for leaf in [draws, *support_leaves(support)]):
        return
    kind = [*_of_users(fn), type(fn).__name__][0]
    inside = np.broadcast_to(np.asarray(support(draws)), (DRAWS, *fn.batch_shape)).reshape(DRAWS, -1)
    if ((~inside).sum(0) >= WRONG).any():
        problem = f"{(~inside).sum(0).max()} of {DRAWS} draws are outside of its support, {support}"
    elif not is_discrete(site) and _is_discrete(np.asarray(draws), fn.event_dim):
        problem = f"its support, {support}, is continuous, but its draws repeat each other or are integers"
    else:
        return
    raise ValueError(
        f"The prior of site '{name}', {kind}, has draws that it should not have: {problem}. An automatic guide would "
        "propose other values than the prior has. Declare the support that the distribution has, `support = "
        "constraints.boolean`, say, of numpyro.distributions."
    )


def _of_users(fn: dist.Distribution) -> list[str]:
    """The classes of users that a distribution is made of."""
    return [type(part).__name__ for part in parts(fn) if not is_of_numpyro(type(part))]


def parts(fn: dist.Distribution) -> Iterator[dist.Distribution]:
    """A distribution and all those that it is made of: what it wraps, and the components of mixtures."""
    yield fn
    for value in vars(fn).values():
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, dist.Distribution):
                yield from parts(part)


def _is_discrete(draws: np.ndarray, event_dim: int) -> bool:
    """Whether, in an element, all draws are integers, or some value comes up too often for a density."""
    events = draws.reshape(DRAWS, -1, int(np.prod(draws.shape[draws.ndim - event_dim :])))[:, :MAX_ELEMENTS]
    integers = (events == np.round(events)).all((0, 2)) & (np.abs(events) < INTEGERS).all((0, 2))
    most = [np.unique(element, axis=0, return_counts=True)[1].max() for element in events.swapaxes(0, 1)]
    return bool(integers.any() or max(most) >= WRONG)
