# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

r"""Two elements in one order, where the posterior has both: what starts that all agree may have lost together.

Let T exchange two elements of a plate, or of events of that size, and with them, where the model asks for it, the
labels of what belongs to them, or a share s for 1 - s. T keeps volumes. So of the draws z of the posterior whose
elements are in one order, A, the other order has the probability

.. math:: P(TA) = P(A) \, E\big[\, p(x, Tz) / p(x, z) \mid A \,\big],

where the ratio is 1 if the model does not tell the elements apart. If the draws have less of the other order, it was
lost: of two orders that are apart, a half of the evidence, log 2 nats. Weights and starts do not show that. (Derived
here.)

What is not found: other symmetries, such as a change of signs, those of more than eight elements, and those that change
more than is tried.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations, product
from typing import NamedTuple

from jax import random
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from scipy.special import softmax

from numpyro_vimco.posterior.chunks import in_chunks
from numpyro_vimco.posterior.fitted import Fitted
from numpyro_vimco.posterior.moments import Estimate
from numpyro_vimco.posterior.proposals import program_of
from numpyro_vimco.sites import is_discrete, is_in_scan, states, support_of

# Two of so many elements at most are exchanged; all subsets of so many changes, and so many pairs, are tried.
MOST_ELEMENTS, MOST_CHANGES, MOST_PAIRS = 8, 6, 3
# Only elements whose means differ by more than this, in posterior standard deviations, and four standard errors.
TOLERANCE, ERRORS = 0.2, 4.0
# From so many draws, at least this share of the posterior is lost for certain, by so many standard errors.
DRAWS, SHARE = 16, 0.05

Draws = Mapping[str, np.ndarray]


class Change(NamedTuple):
    """What becomes of latents where two of K elements are exchanged.

    :ivar name: of the plate, or of the latent.
    :ivar axes: by latent, the axes of its value along which elements are exchanged; empty for another value.
    :ivar value: from a value and the new order, of shape ``(K,)``, to the other value; None where there are axes.
    """

    name: str
    axes: dict[str, tuple[int, ...]]
    value: Callable[[Array, Array], Array] | None = None

    def __call__(self, values: Mapping[str, Array], order: Array) -> dict[str, Array]:
        """All latents after it."""
        changed = dict(values)
        for name, axes in self.axes.items():
            if self.value is not None:
                changed[name] = self.value(values[name], order).astype(values[name].dtype)
            for axis in axes:
                changed[name] = jnp.take(changed[name], order, axis)
        return changed


class LostOrder(NamedTuple):
    """Two elements of whose two orders the draws lack one.

    :ivar names: plates and latents that change together.
    :ivar pair: the elements.
    :ivar latent: by which the orders are told apart.
    :ivar lost: by how much the log evidence is too low at least, in nats.
    """

    names: list[str]
    pair: tuple[int, int]
    latent: str
    lost: float


class Apart(NamedTuple):
    """Where the means of a pair of elements differ most.

    :ivar by: how much, in posterior standard deviations.
    :ivar change: index of the change that exchanges them.
    :ivar where: of the difference, among those of the latent's elements, flat.
    """

    by: float
    change: int
    pair: tuple[int, int]
    latent: str
    where: int


def find_lost_order(
    fit: Fitted, estimates: Mapping[str, Estimate], draws: Draws, log_weight: np.ndarray
) -> LostOrder | None:
    """Two elements of whose orders the draws lack one; None if none are found.

    :param estimates: of the latents that the guide samples, by weighted draws.
    :param draws: some of these, of shape ``(draws, *batch, *event)``.
    :param log_weight: their log-weights, of shape ``(draws,)``, in nats.
    """
    if not np.isfinite(log_weight).any():
        return None
    for size in range(2, MOST_ELEMENTS + 1):
        changes = list(_changes(fit, size))[:MOST_CHANGES]
        apart = sorted(_apart(changes, size, estimates), reverse=True)[:MOST_PAIRS]
        if apart and (found := _largest_loss(fit, changes, size, apart, draws, softmax(log_weight))):
            return found
    return None


def _changes(fit: Fitted, size: int) -> Iterator[Change]:
    """Of plates, of values, and of events, if they have so many elements."""
    latents = {name: site for name, site in fit.latents().items() if not is_in_scan(site)}
    plates: dict[str, dict[str, tuple[int, ...]]] = {}
    values: list[Change] = []
    events: list[Change] = []
    for name, site in latents.items():
        batch_dim = np.ndim(site["value"]) - site["fn"].event_dim
        of_plates = {frame.name: frame.dim + batch_dim for frame in site["cond_indep_stack"]}
        lengths = np.shape(site["value"])
        for plate, axis in of_plates.items():
            if lengths[axis] == size:
                plates.setdefault(plate, {})[name] = (axis,)
        if value := _other_value(site, size):
            values.append(Change(name, {name: ()}, value))
        if axes := tuple(i for i, length in enumerate(lengths) if length == size and i not in of_plates.values()):
            events.append(Change(name, {name: axes}))
    yield from (Change(name, axes) for name, axes in plates.items())
    yield from values
    yield from events


def _other_value(site: dict, size: int) -> Callable[[Array, Array], Array] | None:
    """Another label, of so many; or of a share of two, that of the other."""
    if is_discrete(site):
        are_labels = np.array_equal(states(site["fn"]), np.arange(size))
        return (lambda value, order: order[value.astype(int)]) if are_labels else None
    bounds = [np.asarray(getattr(support_of(site["fn"]), f"{end}_bound", np.nan)) for end in ("lower", "upper")]
    is_share = size == 2 and (bounds[0] == 0).all() and (bounds[1] == 1).all()
    return (lambda value, order: 1 - value) if is_share else None


def _apart(changes: list[Change], size: int, estimates: Mapping[str, Estimate]) -> Iterator[Apart]:
    """For each change that exchanges elements and each pair of them: where their means differ most, if they do."""
    for (i, change), pair in product(enumerate(changes), combinations(range(size), 2)):
        found = []
        for name, axes in change.axes.items():
            for axis in axes[:1]:
                of_pair = [[np.ravel(np.take(x, element, axis)) for x in estimates[name]] for element in pair]
                (mean, error, std), (other_mean, other_error, other_std) = of_pair
                unit = np.maximum(np.maximum(std, other_std), np.finfo(np.float32).tiny)
                by = np.abs(mean - other_mean) / unit
                by = np.where(by > TOLERANCE + ERRORS * (error + other_error) / unit, by, 0)
                found.append(Apart(float(by.max()), i, pair, name, int(by.argmax())))
        if found and max(found).by > 0:
            yield max(found)


def _largest_loss(
    fit: Fitted, changes: list[Change], size: int, apart: list[Apart], draws: Draws, weight: np.ndarray
) -> LostOrder | None:
    """Of all pairs and subsets of changes, what lost most; of equal ones, with as few changes as possible.

    :param weight: of the draws, which sum to one.
    """
    orders = np.tile(np.arange(size), (len(apart), 1))
    signs, points = np.zeros((len(apart), len(weight))), np.zeros((len(apart), DRAWS), int)
    for i, (_, change, pair, latent, where) in enumerate(apart):
        orders[i, list(pair)] = pair[::-1]
        one, other = (np.take(draws[latent], element, changes[change].axes[latent][0] + 1) for element in pair)
        sign = np.sign(one.astype(float) - other).reshape(len(one), -1)[:, where]
        signs[i] = sign if weight @ sign > 0 else -sign  # 1 in the order that most draws have
        steps = np.cumsum(weight * (signs[i] > 0))
        points[i] = np.searchsorted(steps, (np.arange(DRAWS) + 0.5) / DRAWS * steps[-1])
    subsets = np.array(sorted(product([False, True], repeat=len(changes)), key=sum))
    held = {name: jnp.asarray(value[points]) for name, value in draws.items()}
    program = program_of(fit, {})

    def log_joint(of_pair, point, subset) -> Array:
        values = {name: value[of_pair, point] for name, value in held.items()}
        for i, change in enumerate(changes):
            changed = change(values, jnp.asarray(orders)[of_pair])
            values = {name: jnp.where(jnp.asarray(subsets)[subset, i], changed[name], values[name]) for name in values}
        sites = program.at(fit.params, random.key(0), values)
        # Distributions do not look whether a value is in their support.
        changing = [sites.model_trace[name] for change in changes for name in change.axes]
        inside = [jnp.all(support(site["value"])) for site in changing if (support := support_of(site["fn"]))]
        return jnp.where(jnp.all(jnp.stack([jnp.array(True), *inside])), jnp.sum(sites.of_model().shared), -jnp.inf)

    shape = len(apart), DRAWS, len(subsets)
    found = in_chunks(log_joint, fit.chunk_size(), *map(np.ravel, np.indices(shape))).astype(float).reshape(shape)
    with np.errstate(invalid="ignore", over="ignore"):
        ratio = np.nan_to_num(np.exp(found - found[..., :1]), nan=0.0, posinf=0.0)  # to the density with no change
    mean, error = ratio.mean(1), ratio.std(1, ddof=1) / DRAWS**0.5
    # What each draw says of the share that is lost: the ratio in the order that most have, minus 1 in the other.
    terms = mean[..., None] * (signs > 0)[:, None] - (signs < 0)[:, None]
    lost = terms @ weight
    of_shares = np.sqrt(((terms - lost[..., None]) ** 2) @ weight**2)
    lost -= ERRORS * np.hypot(error * ((signs > 0) @ weight)[:, None], of_shares)
    lost *= subsets[:, [about.change for about in apart]].T  # only where the pair is exchanged
    i, subset = map(int, np.unravel_index(np.argmax(np.round(lost, 3)), lost.shape))
    if lost[i, subset] < SHARE:
        return None
    names = [change.name for change, chosen in zip(changes, subsets[subset]) if chosen]
    return LostOrder(names, apart[i].pair, apart[i].latent, float(np.log1p(lost[i, subset])))
