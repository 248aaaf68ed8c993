# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

r"""Label switching: two elements in one order, where the posterior has both. Starts that agree may all have lost one.

Let T exchange two elements of a plate, or of events of that size, and with them, where the model asks for it, the
labels of what belongs to them, or a share s for 1 - s. T keeps volumes. So if A are the draws z of the posterior whose
elements are in one order, and B those in the other, at least

.. math:: P(A) \, E\big[\, \mathbb 1\{Tz \in B\} \; p(x, Tz) / p(x, z) \mid A \,\big] \le P(B)

is the probability of the other order; the ratio is 1 if the model does not tell the elements apart. If the draws have
less of B, it was lost: of two orders that are apart, a half of the evidence, log 2 nats. Weights and starts do not show
that. (Derived here.)

What is not tried: other symmetries, such as a change of signs; more than eight elements, more than the two pairs that
are farthest apart in a plate or an event, or more changes at a time than five; sites in `scan`, masked ones, and models
whose sites are all in a common plate, where each element has weights of its own.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations, product
from typing import NamedTuple

from jax import random
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from numpyro.distributions import constraints
from scipy.special import softmax

from numpyro_vimco.control_flow import is_in_scan
from numpyro_vimco.draws.approximation import Approximation
from numpyro_vimco.draws.chunks import Chunked
from numpyro_vimco.draws.moments import Estimate
from numpyro_vimco.draws.proposals import program_of
from numpyro_vimco.sites import base_support, is_discrete, mask_of, support_of

# Two of so many elements at most are exchanged; all subsets of so many changes, and so many pairs of each, are tried.
MOST_ELEMENTS, MOST_CHANGES, MOST_PAIRS = 8, 5, 2
# Only elements whose means differ by more than this, in posterior standard deviations, and four standard errors.
TOLERANCE, ERRORS = 0.2, 4.0
# From so many draws, at least this share of the posterior is lost for certain, by so many standard errors.
DRAWS, SHARE = 16, 0.05

Values = Mapping[str, np.ndarray]


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


class LostLabels(NamedTuple):
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


class Relabelled(NamedTuple):
    """Two elements that a start has in one order, and the pooled draws in both, as the posterior has them.

    :ivar names: plates and latents that change together.
    :ivar pair: the elements.
    :ivar latents: those whose means the order decides.
    :ivar share: of the posterior, that is in the start's order.
    :ivar std_error: of its logarithm.
    """

    names: list[str]
    pair: tuple[int, int]
    latents: set[str]
    share: float
    std_error: float

    @property
    def log_share(self) -> tuple[float, float]:
        """The logarithm of the share, and its standard error."""
        return float(np.log(self.share)), self.std_error


class Apart(NamedTuple):
    """Where the means of a pair of elements differ most.

    :ivar by: how much, in posterior standard deviations.
    :ivar axis: of the latent's value, along which they are.
    :ivar where: of the difference, among those of the latent's elements, flat.
    """

    by: float
    axis: int
    pair: tuple[int, int]
    latent: str
    where: int


def find_lost_labels(
    approx: Approximation, estimates: Mapping[str, Estimate], draws: Values, log_weight: np.ndarray
) -> LostLabels | None:
    """Two elements of whose orders the draws lack one; None if none are found.

    :param estimates: of the latents that the guide samples, by weighted draws.
    :param draws: some of these, of shape ``(draws, *batch, *event)``.
    :param log_weight: their log-weights, of shape ``(draws,)``, in nats.
    """
    for size, changes, apart, weight in _candidates(approx, estimates, log_weight):
        if found := _largest_loss(approx, changes, size, apart, draws, weight):
            return found
    return None


def find_relabelled(
    approx: Approximation, of_start: Mapping[str, Estimate], draws: Values, log_weight: np.ndarray
) -> Relabelled | None:
    """Two elements whose order in a start is one of two that the pooled draws have; None if none are found.

    :param of_start: estimates of the latents by the start alone.
    :param draws: of the pool, of shape ``(draws, *batch, *event)``.
    :param log_weight: their log-weights, of shape ``(draws,)``, in nats.
    """
    for size, changes, apart, weight in _candidates(approx, of_start, log_weight):
        mean_orders = [_order_of(about, of_start[about.latent].mean, 0, np) for about in apart]
        signs = np.stack(
            [order * _order_of(about, draws[about.latent], 1, np) for order, about in zip(mean_orders, apart)]
        )
        both = np.minimum((signs > 0) @ weight, (signs < 0) @ weight) >= SHARE
        if not both.any():
            continue
        apart, signs = [about for about, is_in in zip(apart, both) if is_in], signs[both]
        subsets = _subsets(changes)
        ratio = _ratios(approx, changes, size, apart, draws, signs, weight, subsets)
        lost, error = _lost_shares(ratio, signs, weight)
        # Without any change the order stays, and the ratio is 0.
        for i, subset in np.argwhere((ratio.mean(1) > 0) & (np.abs(lost) <= SHARE + error)):
            chosen, names = _chosen(changes, subsets[subset])
            latents = {name for change in chosen for name in change.axes}
            share = float((signs[i] > 0) @ weight)
            std_error = float(np.sqrt((1 / share - 1) * weight @ weight))
            return Relabelled(names, apart[i].pair, latents, share, std_error)
    return None


def _candidates(
    approx: Approximation, estimates: Mapping[str, Estimate], log_weight: np.ndarray
) -> Iterator[tuple[int, list[Change], list[Apart], np.ndarray]]:
    """Where elements are apart: how many there are, their changes, the pairs; and the normalized weights."""
    if not np.isfinite(log_weight).any():
        return
    for size in range(2, MOST_ELEMENTS + 1):
        changes = list(_changes(approx, size))[:MOST_CHANGES]
        if apart := [pair for change in changes for pair in _apart(change, size, estimates)]:
            yield size, changes, apart, softmax(log_weight)


def _subsets(changes: list[Change]) -> np.ndarray:
    """All subsets of changes, small ones first: booleans of shape ``(subsets, changes)``."""
    return np.array(sorted(product([False, True], repeat=len(changes)), key=sum))


def _chosen(changes: list[Change], subset: np.ndarray) -> tuple[list[Change], list[str]]:
    """The changes of a subset, and their names."""
    chosen = [change for change, is_chosen in zip(changes, subset) if is_chosen]
    return chosen, list(dict.fromkeys(change.name for change in chosen))


def _changes(approx: Approximation, size: int) -> Iterator[Change]:
    """Of plates, of values, and of events, if they have so many elements."""
    latents = {
        name: site for name, site in approx.latents().items() if not is_in_scan(site) and mask_of(site["fn"]) is None
    }
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
    support = base_support(support_of(site["fn"]))
    names = ("lower_bound", "upper_bound")
    low, high = (0, 1) if support is constraints.boolean else (getattr(support, name, np.nan) for name in names)
    if is_discrete(site) and np.all(low == 0) and np.all(high == size - 1):
        return lambda value, order: order[value.astype(int)]
    if not is_discrete(site) and np.all(low == 0) and np.all(high == 1) and size == 2:
        return lambda value, order: 1 - value
    return None


def _apart(change: Change, size: int, estimates: Mapping[str, Estimate]) -> list[Apart]:
    """The pairs of elements that a change exchanges whose means differ most, and where."""
    found = []
    for (name, axes), pair in product(change.axes.items(), combinations(range(size), 2)):
        for axis in axes[:1]:
            of_pair = [[np.ravel(np.take(x, element, axis)) for x in estimates[name]] for element in pair]
            (mean, error, std), (other_mean, other_error, other_std) = of_pair
            unit = np.maximum(np.maximum(std, other_std), np.finfo(np.float32).tiny)
            by = np.abs(mean - other_mean) / unit
            by = np.where(by > TOLERANCE + ERRORS * (error + other_error) / unit, by, 0)
            found.append(Apart(float(by.max()), axis, pair, name, int(by.argmax())))
    return [pair for pair in sorted(found, reverse=True)[:MOST_PAIRS] if pair.by > 0]


def _largest_loss(
    approx: Approximation, changes: list[Change], size: int, apart: list[Apart], draws: Values, weight: np.ndarray
) -> LostLabels | None:
    """Of all pairs and subsets of changes, what lost most; of equal ones, with as few changes as possible.

    :param weight: of the draws, which sum to one.
    """
    orders = np.stack([_order_of(about, draws[about.latent], 1, np) for about in apart])
    signs = np.where((orders @ weight > 0)[:, None], orders, -orders)  # 1 in the order that most draws have
    subsets = _subsets(changes)
    lost, error = _lost_shares(_ratios(approx, changes, size, apart, draws, signs, weight, subsets), signs, weight)
    lost -= error
    i, subset = map(int, np.unravel_index(np.argmax(np.round(lost, 3)), lost.shape))
    if lost[i, subset] < SHARE:
        return None
    _, names = _chosen(changes, subsets[subset])
    return LostLabels(names, apart[i].pair, apart[i].latent, float(np.log1p(lost[i, subset])))


def _ratios(
    approx: Approximation,
    changes: list[Change],
    size: int,
    apart: list[Apart],
    draws: Values,
    signs: np.ndarray,
    weight: np.ndarray,
    subsets: np.ndarray,
) -> np.ndarray:
    """The ratio p(x, Tz) / p(x, z) where T leads to the other order, else 0: of shape ``(pairs, DRAWS, subsets)``.

    The draws z are of the order that most have.
    """
    steps = np.cumsum(weight * (signs > 0), axis=1)
    quantiles = (np.arange(DRAWS) + 0.5) / DRAWS
    points = np.stack([np.searchsorted(row, quantiles * row[-1]) for row in steps])
    orders = np.tile(np.arange(size), (len(apart), 1))
    for order, about in zip(orders, apart):
        order[list(about.pair)] = about.pair[::-1]
    held = {name: jnp.asarray(value[points]) for name, value in draws.items()}
    program = program_of(approx, {})

    def exchanged(params, of_pair, point, subset) -> tuple[Array, Array]:
        """The log joint density, and the order by each of the pairs."""
        values = {name: value[of_pair, point] for name, value in held.items()}
        for i, change in enumerate(changes):
            changed = change(values, jnp.asarray(orders)[of_pair])
            values = {name: jnp.where(jnp.asarray(subsets)[subset, i], changed[name], values[name]) for name in values}
        sites = program.at(params, random.key(0), values)
        # Where validation is off, distributions do not look whether a value is in their support.
        inside = jnp.array([_is_inside(sites.model_trace[name]) for name in approx.latents()])
        order = jnp.array([_order_of(about, values[about.latent], 0, jnp) for about in apart])
        return jnp.where(inside.all(), jnp.sum(sites.of_model().shared), -jnp.inf), order

    shape = len(apart), DRAWS, len(subsets)
    log_joint, order = Chunked(exchanged, approx.chunk_size()).all(approx.params, *map(np.ravel, np.indices(shape)))
    log_joint = log_joint.astype(float).reshape(shape)
    order = np.stack([order.reshape(*shape, -1)[i, ..., i] for i in range(len(apart))])
    with np.errstate(invalid="ignore", over="ignore"):
        ratio = np.nan_to_num(np.exp(log_joint - log_joint[..., :1]), nan=0.0, posinf=0.0)
    return ratio * (order * order[..., :1] < 0)


def _lost_shares(ratio: np.ndarray, signs: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What draws lack at least of the other order, and four standard errors of it, of shape ``(pairs, subsets)``.

    These are shares of the posterior, in units of what the draws have.
    """
    mean, error = ratio.mean(1), ratio.std(1, ddof=1) / DRAWS**0.5
    # What each draw says of it: the ratio in the order that most have, minus 1 in the other.
    terms = mean[..., None] * (signs > 0)[:, None] - (signs < 0)[:, None]
    lost = terms @ weight
    of_shares = np.sqrt(((terms - lost[..., None]) ** 2) @ weight**2)
    return lost, ERRORS * np.hypot(error * ((signs > 0) @ weight)[:, None], of_shares)


def _order_of(about: Apart, value, leading: int, numpy):
    """Which of the two elements is larger: -1, 0 or 1.

    :param value: of the latent, with so many leading axes.
    :param numpy: NumPy, or that of JAX.
    """
    one, other = (numpy.take(value, element, about.axis + leading).astype(float) for element in about.pair)
    return numpy.sign(one - other).reshape(*value.shape[:leading], -1)[..., about.where]


def _is_inside(site: dict) -> Array:
    """Whether a value is in the support of its distribution; True if that does not know."""
    try:
        return jnp.all(site["fn"].support(site["value"]))
    except (NotImplementedError, ValueError):
        return jnp.array(True)
