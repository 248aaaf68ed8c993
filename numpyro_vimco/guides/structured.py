# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Sites of a guide, drawn one after the other, each given those before it. The formula: :class:`.AutoMixed`.

Values have the shape of their site, ``(*batch, *event)``. Couplings act on a site's *elements* in the order in which
they are drawn: arrays of shape ``(*local, n, …)``. ``local`` are the sizes of *local plates*, whose elements are drawn
independently given the sites outside of the plate; n is the number of elements along all other dimensions. A site
outside of a local plate has size 1 there, and broadcasts over the plate's elements.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.transforms import StickBreakingTransform, Transform

from numpyro_vimco.families.autoregressive import (
    AutoregressiveDiscrete,
    AutoregressiveNormal,
    Coupling,
    Elements,
    FullCoupling,
    LowRankCoupling,
)
from numpyro_vimco.families.bounds import Bounds, total_of
from numpyro_vimco.families.components import Components
from numpyro_vimco.families.distributions import InsideSimplex
from numpyro_vimco.families.families import Count, CountMixture, Family, jitter
from numpyro_vimco.families.units import RealInUnits
from numpyro_vimco.randomness import CHAIN

Samples = dict[str, Array]

# The couplings of one site are a full matrix up to this number of entries, such as those of 360 switches with each
# other. Beyond, they are a product of two matrices of this rank.
FULL_ENTRIES, RANK = 2**17, 8
# Logarithms (of scales, and of the location of a count) are linear in features of discrete sites up to this size, that
# of a count three scales of its prior from the median. Beyond, scales would grow without bound, and a fit that wants
# them larger would drive the count there.
LARGEST = 3.0
# Of more discrete sites than this, log scales are saturated as those of the elements of one site are.
FEW = 2


class Statements(Protocol):
    """The statements of a guide: those of NumPyro, or ones that draw at known parameters without a trace."""

    def plates(self, site: dict) -> ExitStack:
        """A context of a site's plates."""

    def param(self, name: str, start: Any, **kwargs) -> Array:
        """A parameter."""

    def sample(self, name: str, fn: dist.Distribution) -> Array:
        """A draw."""

    def constant(self, value: Array, event_dim: int) -> Array:
        """A constant of full plates, as far as a call sees these."""


class InGuide:
    """NumPyro's statements, in the plates of one call of a guide.

    :param homes: the chain of each latent in one.
    """

    def __init__(self, plates: dict[str, numpyro.plate], homes: Mapping[str, str]):
        self._plates, self._homes = plates, homes

    def plates(self, site: dict) -> ExitStack:
        """A context of a site's plates."""
        stack = ExitStack()
        for frame in site["cond_indep_stack"]:
            if frame.name in self._plates:  # the steps of a chain are no plate of the model
                stack.enter_context(self._plates[frame.name])
        return stack

    def param(self, name: str, start: Any, **kwargs) -> Array:
        """A parameter."""
        return numpyro.param(name, start, **kwargs)

    def sample(self, name: str, fn: dist.Distribution) -> Array:
        """A draw."""
        # The steps of a chain are a dimension that no plate explains.
        return numpyro.sample(name, fn, infer={CHAIN: self._homes[name]} if name in self._homes else None)

    def constant(self, value: Array, event_dim: int) -> Array:
        """A constant of full plates, for the subsample of this call."""
        return numpyro.subsample(value, event_dim)


class FromParams:
    """Draws at known parameters, of full plates; each site from a key of its own."""

    def __init__(self, params: Samples, keys: dict[str, Array]):
        self._params, self._keys = params, keys

    def plates(self, site: dict) -> ExitStack:
        """An empty context, as parameters are those of full plates."""
        return ExitStack()

    def param(self, name: str, start: Any, **kwargs) -> Array:
        """A parameter."""
        return self._params[name]

    def sample(self, name: str, fn: dist.Distribution) -> Array:
        """A draw."""
        return fn.sample(self._keys[name])

    def constant(self, value: Array, event_dim: int) -> Array:
        """A constant of full plates."""
        return value


@dataclass(frozen=True, kw_only=True)
class Site(ABC):
    """A site of the guide, and what it depends on.

    :ivar site: the site as traced in the model.
    :ivar start: values of its parameters to begin with, of full plates.
    :ivar event_dim: number of event dimensions of its value.
    :ivar elements: the order of its elements.
    :ivar coupled: earlier sites that it depends on through couplings.
    :ivar is_coupled_within: whether its elements depend on each other.
    :ivar has_moving_support: whether the values that it can have depend on earlier sites.
    """

    name: str
    site: dict
    start: Samples
    event_dim: int
    elements: Elements
    coupled: tuple[str, ...] = ()
    is_coupled_within: bool = False
    has_moving_support: bool = False

    @property
    @abstractmethod
    def full_shape(self) -> tuple[int, ...]:
        """Shape of its elements in full plates, ``(*batch, *event)``."""

    @property
    def depends(self) -> bool:
        """Whether any element depends on another, or on an earlier site."""
        return bool(self.coupled) or (self.is_coupled_within and self.elements.count(self.full_shape) > 1)

    @abstractmethod
    def draw(self, earlier: "Earlier") -> tuple[Array, Array]:
        """Its value, and its features for later sites, of shape ``(*local, n, f)``."""


@dataclass(frozen=True)
class Sampler:
    """The sites of a guide, in the order in which they are drawn.

    :ivar prefix: prefix of the names of parameters.
    :ivar speed: factor on couplings.
    :ivar rank: rank of couplings; None for full matrices up to :data:`FULL_ENTRIES`.
    :ivar support: from the name of a site, and the values of earlier ones, to its support in the model.
    """

    sites: tuple[Site, ...]
    prefix: str
    speed: float
    rank: int | None
    support: Callable[[str, Samples], constraints.Constraint]

    def run(self, statements: Statements) -> Samples:
        """Draw all sites."""
        earlier = Earlier(self, statements, {}, {}, {})
        for site in self.sites:
            with statements.plates(site.site):
                earlier.values[site.name], earlier.features[site.name] = site.draw(earlier)
            earlier.sites[site.name] = site
        return earlier.values


@dataclass(frozen=True)
class Earlier:
    """The sites that have been drawn, and statements for the next one."""

    sampler: Sampler
    statements: Statements
    sites: dict[str, Site]
    values: Samples
    features: Samples

    def param(self, site: Site, name: str, start: Any, **kwargs) -> Array:
        """A parameter of a site."""
        return self.statements.param(f"{site.name}_{self.sampler.prefix}_{name}", start, **kwargs)

    def support(self, site: Site) -> constraints.Constraint:
        """The support of a site at the values that have been drawn."""
        return self.sampler.support(site.name, self.values) if site.has_moving_support else site.site["fn"].support

    def shifts(
        self,
        site: Site,
        name: str,
        parents: Iterable[str],
        num_shifts: int,
        num_features: int = 0,
        largest: float | None = None,
    ) -> tuple[dict[str, Array], Coupling | None]:
        """What earlier sites add to the parameters of a site's distribution, and the couplings of its own elements.

        :param name: the name of the couplings' parameter.
        :param parents: the earlier sites.
        :param num_shifts: number of parameters of one element that are shifted.
        :param num_features: number of features that an element has for later ones of its site; 0 for no such couplings.
        :param largest: up to which size features of earlier discrete sites count; None for no limit.
        :return: for each earlier site, shifts of shape ``(*local, n, num_shifts)``; and the couplings of the site's
            elements to each other, None if there are none.
        """
        features = {
            parent: limited(self.features[parent], largest if isinstance(self.sites[parent], DiscreteSite) else None)
            for parent in parents
        }
        features = {parent: value.reshape(*value.shape[:-2], -1) for parent, value in features.items()}
        n = site.elements.count(site.full_shape)
        num_features = num_features if site.is_coupled_within and n > 1 else 0
        sizes = [value.shape[-1] for value in features.values()]
        ends = np.cumsum([*sizes, n * num_features])
        if not ends[-1]:
            return {}, None
        left, right = self._weights(site, name, num_shifts, int(ends[-1]))
        shifts = {}
        for parent, end, size in zip(features, ends, sizes):
            if right is None:
                shifts[parent] = jnp.einsum("...p,...nkp->...nk", features[parent], left[..., end - size : end])
            else:
                shifts[parent] = jnp.einsum("...r,...nkr->...nk", features[parent] @ right[end - size : end], left)
        if not num_features:
            return shifts, None
        if right is not None:
            return shifts, LowRankCoupling(left, right[sum(sizes) :].reshape(n, num_features, -1))
        matrix = left[..., sum(sizes) :]
        return shifts, FullCoupling(matrix.reshape(*matrix.shape[:-1], n, num_features))

    def _weights(self, site: Site, name: str, num_shifts: int, size: int) -> tuple[Array, Array | None]:
        """A matrix of shape ``(*local, n, num_shifts, size)``, zero at the start; or two of which it is the product."""
        shape, event_dim = (*site.full_shape, num_shifts), site.event_dim + 2
        rank = self.sampler.rank
        if rank is None and math.prod(shape) * size > FULL_ENTRIES:
            rank = RANK
        if rank is None:
            left = self.param(site, name, jnp.zeros((*shape, size)), event_dim=event_dim)
            return self.sampler.speed * site.elements.gather(left), None

        def start(rng_key: Array) -> Array:
            return jax.random.normal(rng_key, (size, rank)) / math.sqrt(rank)

        left = self.param(site, f"{name}_left", jnp.zeros((*shape, rank)), event_dim=event_dim)
        return self.sampler.speed * site.elements.gather(left), self.param(site, f"{name}_right", start)


@dataclass(frozen=True, kw_only=True)
class DiscreteSite(Site):
    """A discrete site: its elements are of one family, with parameters that earlier elements shift.

    :ivar has_total: whether its last dimension has a sum that is given, as that of a Multinomial. The counts are drawn
        one after the other: each is at most what is left, and the last one takes it.
    """

    family: Family
    has_total: bool = False

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape of its elements in full plates."""
        start = next(iter(self.start.values()))
        return jnp.shape(start)[: jnp.ndim(start) - self.family.event_dim]

    @property
    def depends(self) -> bool:
        """Whether any element depends on another, on an earlier site, or on its mixture component."""
        return isinstance(self.family, CountMixture) or self.has_total or super().depends

    @property
    def _largest(self) -> float | None:
        """The size of features that count: what is shifted is a logarithm for counts, and logits otherwise."""
        return LARGEST if isinstance(self.family, Count) else None

    def draw(self, earlier: Earlier) -> tuple[Array, Array]:
        """Its value, and features for later sites."""
        family, elements = self.family, self.elements
        constraints = family.constraints(self.start, f"{self.name}_{earlier.sampler.prefix}")
        params = {
            k: earlier.param(
                self,
                k,
                lambda rng_key, k=k: jitter(self.start[k], constraints[k], rng_key),
                constraint=constraints[k],
                event_dim=self.event_dim + family.event_dim,
            )
            for k in self.start
        }
        some = next(iter(params.values()))
        shape = some.shape[: some.ndim - family.event_dim]
        shifts, within = earlier.shifts(
            self, "weights", self.coupled, family.num_shifts, family.num_features, self._largest
        )
        if shifts:
            total = jnp.sum(jnp.stack(jnp.broadcast_arrays(*shifts.values())), axis=0)
            shifted = family.shifted(total, **{k: elements.gather(v) for k, v in params.items()})
            params = {k: elements.scatter(value, shape) for k, value in shifted.items()}
        fn = self._distribution(earlier.support(self), params, within, shape)
        value = earlier.statements.sample(self.name, fn.to_event(self.event_dim))
        return value, elements.gather(family.features(value))

    def _distribution(
        self, support: constraints.Constraint, params: Samples, within: Coupling | None, shape: tuple[int, ...]
    ) -> dist.Distribution:
        """The distribution of all elements.

        :param within: couplings of elements to each other.
        """
        bounds = Bounds.of(support, shape) if self.has_moving_support and not self.has_total else None
        if within is None and not self.has_total:
            return self.family.distribution(**params, within=bounds)
        gather = self.elements.gather
        family = self.family.over(lambda of_elements: gather(np.broadcast_to(of_elements, shape)))
        ordered = {k: gather(value) for k, value in params.items()}
        cut = bounds and bounds.map(gather)
        total = gather(jnp.broadcast_to(total_of(support)[..., None], shape)) if self.has_total else None

        def conditional(values: Array) -> dist.Distribution:
            shifted = ordered
            if within is not None:
                features = limited(family.features(values), self._largest)
                shifted = family.shifted(within.apply(features), **ordered)
            of_values = cut if total is None else Bounds.of_rest(total, values, shape[-1])
            return family.distribution(**shifted, within=of_values)

        start = gather(jnp.broadcast_to(jnp.asarray(self.family.low), shape))
        return AutoregressiveDiscrete(conditional, self.elements, self.family.support, start, shape)


@dataclass(frozen=True, kw_only=True)
class ContinuousSite(Site):
    """A continuous site: Normal in unconstrained space, linear in the features of earlier elements.

    :ivar centre: location of draws of the prior in unconstrained space, of shape ``full_shape``.
    :ivar unit: their scale, of the same shape.
    :ivar components: where mixture components begin, in unconstrained space; None for a single Normal.
    :ivar own: discrete sites all of whose plates it is in. It depends on the same element of these plates, with
        coefficients that learn at full speed.
    :ivar gates: for some of ``own``, at which of their values the site has an effect (1) or none (0).
    :ivar prior: earlier sites that its prior depends on. It depends on these where it has no effect, too.
    """

    centre: Array
    unit: Array
    components: Components | None = None
    own: tuple[str, ...] = ()
    gates: dict[str, np.ndarray] = field(default_factory=dict)
    prior: frozenset[str] = frozenset()

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape of its elements in full plates."""
        return jnp.shape(self.start["loc"])

    @property
    def depends(self) -> bool:
        """Whether any element depends on another, or on an earlier site."""
        return bool(self.own) or self.components is not None or super().depends

    def draw(self, earlier: Earlier) -> tuple[Array, Array]:
        """Its value, and features for later sites."""
        elements = self.elements
        params = self._params(earlier)
        own_loc, own_log_scale, of_several = self._own_shifts(earlier)
        # Continuous latents are coupled in units of the prior. In those of the guide's own scales, a narrow ridge would
        # need a coupling without bound.
        centre, unit = (earlier.statements.constant(x, self.event_dim) for x in (self.centre, self.unit))
        own_scale = jnp.exp(own_log_scale)
        loc = centre if self.components is not None else params["loc"] + own_loc
        gate = self._gate(earlier, params["loc"].shape[: len(self.full_shape)])
        discrete = [name for name in self.coupled if isinstance(earlier.sites[name], DiscreteSite)]
        continuous = [name for name in self.coupled if name not in discrete]
        of_loc, _ = earlier.shifts(self, "loc_weights", discrete, 1)
        of_scale, _ = earlier.shifts(self, "log_scale_weights", discrete, 1, largest=LARGEST)
        of_continuous, within = earlier.shifts(self, "couplings", continuous, 1, 1)
        shift, in_units = self._sum(of_loc, gate), unit * self._sum(of_continuous, gate)
        spread = jnp.exp(saturated(of_several + self._sum(of_scale, gate)))
        if self.components is not None:
            widths = params["scale"] * _last(own_scale)
            locs = params["loc"] + _last(own_loc + in_units) + widths * _last(shift)
            normal = dist.Normal(locs, widths * _last(spread))
            fn: dist.Distribution = dist.MixtureSameFamily(dist.Categorical(logits=params["logits"]), normal)
        elif within is None:
            scale = params["scale"] * own_scale
            fn = dist.Normal(loc + scale * shift + in_units, scale * spread)
        else:
            scale = params["scale"] * own_scale / unit
            shift, spread = scale * shift + in_units / unit, scale * spread
            loc_of, unit_of, shift_of, spread_of, gate_of = (
                elements.gather(jnp.broadcast_to(x, gate.shape)) for x in (loc, unit, shift, spread, gate)
            )
            fn = AutoregressiveNormal(loc_of, unit_of, shift_of, spread_of, gate_of, within, elements, gate.shape)
        transform = inside(biject_to(earlier.support(self)))
        fn = dist.TransformedDistribution(fn.to_event(self.event_dim), transform)
        value = earlier.statements.sample(self.name, fn)
        return value, elements.gather(gate * (transform.inv(value) - loc) / unit)[..., None]

    def _params(self, earlier: Earlier) -> Samples:
        """Location and scale; of mixture components with an axis for them, and the logits of their weights."""
        if self.components is None:
            event_dim, start, centre, unit = self.event_dim, self.start, self.centre, self.unit
        else:
            event_dim, start = self.event_dim + 1, self.components._asdict()
            centre, unit = start["loc"], start["scale"]
        params = {"loc": self._in_units(earlier, "loc", start["loc"], centre, unit, event_dim)}
        params["scale"] = earlier.param(
            self, "scale", start["scale"], constraint=constraints.positive, event_dim=event_dim
        )
        if self.components is not None:
            # Each start of a fit begins elsewhere, as with one component (`init_to_median`).
            vector = constraints.real_vector
            begin = partial(jitter, start["logits"], vector)
            params["logits"] = earlier.param(self, "logits", begin, constraint=vector, event_dim=event_dim)
        return params

    def _in_units(
        self, earlier: Earlier, name: str, start, centre, unit: Array, event_dim: int, own: str = ""
    ) -> Array:
        """A location, or what an own site adds to it."""
        stem = f"{self.name}_{earlier.sampler.prefix}"
        log_scale = f"{stem}_log_scale_{own}" if own else None
        is_renewed = not own or self.components is None
        constraint = RealInUnits(centre, unit, f"{stem}_scale" if is_renewed else None, log_scale)
        if self.components is not None and not own:
            start = partial(jitter, start, constraint)
        return earlier.param(self, name, start, constraint=constraint, event_dim=event_dim)

    def _own_shifts(self, earlier: Earlier) -> tuple[Array | float, Array | float, Array | float]:
        """What the sites of ``own`` add to location and log-scale; the latter first by one element, then by several."""
        of_loc: Array | float = 0.0
        of_one: Array | float = 0.0
        of_several: Array | float = 0.0
        for name in self.own:
            features = _features_in_plates(earlier, name, self.event_dim)
            zeros = jnp.zeros((*self.full_shape, features.shape[-1]))
            event_dim = self.event_dim + 1
            weights = self._in_units(earlier, f"loc_{name}", zeros, 0.0, self.unit[..., None], event_dim, name)
            of_loc = of_loc + jnp.sum(weights * features, axis=-1)
            weights = earlier.param(self, f"log_scale_{name}", zeros, event_dim=self.event_dim + 1)
            site = earlier.sites[name]
            assert isinstance(site, DiscreteSite)
            shift = jnp.sum(weights * limited(features, LARGEST), axis=-1)
            if features.shape[-1] > site.family.num_features or len(self.own) > FEW:
                of_several = of_several + shift
            else:
                of_one = of_one + shift
        return of_loc, of_one, of_several

    def _gate(self, earlier: Earlier, shape: tuple[int, ...]) -> Array:
        """0 for elements that have no effect at the values drawn for the sites of ``gates``, 1 for others."""
        gate = jnp.ones(shape)
        for name, table in self.gates.items():
            value, site = earlier.values[name], earlier.sites[name]
            assert isinstance(site, DiscreteSite)
            is_on = jnp.asarray(table, gate.dtype)[value - site.family.low]
            gate = gate * is_on.reshape(*value.shape, *(1,) * (len(shape) - value.ndim))
        return gate

    def _sum(self, shifts: dict[str, Array], gate: Array) -> Array | float:
        """The sum of shifts, of the shape of the site."""
        total: Array | float = 0.0
        for name, shift in shifts.items():
            shift = self.elements.scatter(shift[..., 0], gate.shape)
            total = total + (shift if name in self.prior else gate * shift)
        return total


def _last(x: Array | float) -> Array:
    """With an axis for mixture components."""
    return jnp.asarray(x)[..., None]


def limited(features: Array, largest: float | None) -> Array:
    """Features of a size of at most ``largest``; as they are for None."""
    return features if largest is None else jnp.clip(features, -largest, largest)


def saturated(shift: Array | float) -> Array | float:
    """A shift of a log-scale by several elements, of a size of at most :data:`LARGEST`.

    Each element may shift it by little, and all together by so much that a rare draw of them overflows.
    """
    return LARGEST * jnp.tanh(shift / LARGEST)


def inside(transform: Transform) -> Transform:
    """A transform to a support, whose values stay off the boundary."""
    return InsideSimplex() if type(transform) is StickBreakingTransform else transform


def _features_in_plates(earlier: Earlier, name: str, event_dim: int) -> Array:
    """Features of a discrete site for each element of another site in its plates: those of the same element of each
    plate, and of all elements along other dimensions.

    :return: of a shape that broadcasts to the other site's (*batch, *event, f).
    """
    site = earlier.sites[name]
    assert isinstance(site, DiscreteSite)
    features = site.family.features(earlier.values[name])
    dims = tuple(frame.dim for frame in site.site["cond_indep_stack"])
    ordered = Elements(features.ndim - 1 - site.event_dim, site.event_dim, dims).gather(features)
    return ordered.reshape(*ordered.shape[:-2], *(1,) * event_dim, -1)
