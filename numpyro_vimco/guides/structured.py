# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Sites of a guide, drawn one after the other, each given those before it. The formula: :class:`.AutoMixed`."""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import biject_to, constraints

from numpyro_vimco.guides.autoregressive import (
    AutoregressiveDiscrete,
    AutoregressiveNormal,
    Coupling,
    Elements,
    FullCoupling,
    LowRankCoupling,
)
from numpyro_vimco.guides.families import Family, jitter

Samples = dict[str, Array]

# A matrix of couplings of one site has at most so many entries, of 360 switches to each other, say; beyond, it is of
# low rank.
FULL_ENTRIES, RANK = 2**17, 16


class Statements(Protocol):
    """How a guide states its parameters and samples: as NumPyro's statements, or from parameters that are known."""

    def plates(self, site: dict) -> Any:
        """A context of the site's plates."""

    def param(self, name: str, start: Any, **kwargs) -> Array:
        """A parameter."""

    def sample(self, name: str, fn: dist.Distribution) -> Array:
        """A draw."""


class InGuide:
    """NumPyro's statements."""

    def __init__(self, plates: dict[str, numpyro.plate]):
        self._plates = plates
        self.param, self.sample = numpyro.param, numpyro.sample

    def plates(self, site: dict) -> Any:
        """A context of the site's plates."""
        stack = ExitStack()
        for frame in site["cond_indep_stack"]:
            stack.enter_context(self._plates[frame.name])
        return stack


class FromParams:
    """Draws at known parameters, of full plates."""

    def __init__(self, params: Samples, keys: dict[str, Array]):
        self._params, self._keys = params, keys

    def plates(self, site: dict) -> Any:
        """Nothing: parameters are of full plates."""
        return ExitStack()

    def param(self, name: str, start: Any, **kwargs) -> Array:
        """The parameter's value."""
        return self._params[name]

    def sample(self, name: str, fn: dist.Distribution) -> Array:
        """A draw."""
        return fn.sample(self._keys[name])


@dataclass(frozen=True)
class Site:
    """A site of the guide, and what it depends on.

    :ivar name: its name.
    :ivar site: as traced in the model.
    :ivar start: its parameters to begin with, of full plates: of a discrete site, those of the family; of a continuous
        one, `loc` in unconstrained space, and `scale`.
    :ivar family: of a discrete site; None if it is continuous.
    :ivar event_dim: event dimensions of the parameters, those of the family left out.
    :ivar elements: the order of its elements.
    :ivar own: discrete sites that a continuous one depends on at full speed.
    :ivar coupled: earlier sites that it depends on through slow couplings.
    :ivar is_coupled_within: whether its elements depend on each other.
    :ivar gates: for discrete sites of the same shape, which values leave a continuous site without effect: 0 there.
    """

    name: str
    site: dict
    start: Samples
    family: Family | None
    event_dim: int
    elements: Elements
    own: tuple[str, ...] = ()
    coupled: tuple[str, ...] = ()
    is_coupled_within: bool = False
    gates: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampler:
    """The sites of a guide, in the order in which they are drawn.

    :ivar speed: factor on couplings that are not `own`.
    :ivar rank: rank of couplings; None for full matrices up to :data:`FULL_ENTRIES`.
    """

    sites: tuple[Site, ...]
    prefix: str
    speed: float
    rank: int | None
    scale_constraint: constraints.Constraint = constraints.softplus_positive

    def run(self, statements: Statements) -> Samples:
        """Draw all sites."""
        drawn = _Drawn(self, {}, {}, {})
        for site in self.sites:
            if site.family is None:
                self._draw_continuous(site, statements, drawn)
            else:
                self._draw_discrete(site, statements, drawn)
        return drawn.values

    def sample_posterior(self, keys: dict[str, Array], params: Samples) -> Samples:
        """Draw all sites at known parameters."""
        return self.run(FromParams(params, keys))

    # Discrete sites.

    def _draw_discrete(self, site: Site, statements: Statements, drawn: "_Drawn") -> None:
        family = site.family
        with statements.plates(site.site):
            params = {
                k: statements.param(
                    f"{site.name}_{self.prefix}_{k}",
                    lambda key, start=start, k=k: jitter(start, family.constraints[k], key),
                    constraint=family.constraints[k],
                    event_dim=site.event_dim + family.event_dim,
                )
                for k, start in site.start.items()
            }
            shape = jnp.shape(next(iter(params.values())))
            shape = shape[: len(shape) - family.event_dim]
            gather = site.elements.gather
            shift, within = self._couplings(site, "weights", site.coupled, family.num_shifts, statements, drawn)
            if shift is None and within is None:
                fn = family.distribution(**params)
            else:
                ordered = {k: gather(value) for k, value in params.items()}
                if shift is not None:
                    ordered = family.shifted(shift, **ordered)
                if within is None:
                    fn = family.distribution(**{k: site.elements.scatter(v, shape) for k, v in ordered.items()})
                else:
                    fn = self._autoregressive(site, family, ordered, within, shape)
            value = statements.sample(site.name, fn.to_event(site.event_dim))
        drawn.values[site.name] = value
        drawn.features[site.name] = gather(family.features(value))

    def _autoregressive(
        self, site: Site, family: Family, params: Samples, within: Coupling, shape
    ) -> dist.Distribution:
        arranged = family.over(lambda bound: np.asarray(site.elements.gather(np.broadcast_to(bound, shape))))

        def conditional(values: Array) -> dist.Distribution:
            return arranged.distribution(**arranged.shifted(within.apply(arranged.features(values)), **params))

        first = next(iter(params.values()))
        ndim = first.ndim - family.event_dim
        start = jnp.broadcast_to(jnp.asarray(arranged.low if hasattr(arranged, "low") else 0), first.shape[:ndim])
        return AutoregressiveDiscrete(conditional, site.elements, family.support, start, shape)

    # Continuous sites.

    def _draw_continuous(self, site: Site, statements: Statements, drawn: "_Drawn") -> None:
        loc, log_scale = site.start["loc"], 0.0
        event_dim = site.event_dim
        names = {k: f"{site.name}_{self.prefix}_{k}" for k in ("loc", "scale")}
        with statements.plates(site.site):
            scale = statements.param(
                names["scale"], site.start["scale"], constraint=self.scale_constraint, event_dim=event_dim
            )
            loc = statements.param(names["loc"], site.start["loc"], event_dim=event_dim)
            shape = jnp.shape(loc)
            for parent in site.own:
                features = drawn.own_features(site, parent)
                zeros = jnp.zeros((*jnp.shape(site.start["loc"]), features.shape[-1]))
                own = [
                    statements.param(f"{site.name}_{self.prefix}_{part}_{parent}", zeros, event_dim=event_dim + 1)
                    for part in ("loc", "log_scale")
                ]
                loc = loc + jnp.sum(own[0] * features, axis=-1)
                log_scale = log_scale + jnp.sum(own[1] * features, axis=-1)
            gather = site.elements.gather
            gate = drawn.gate(site, shape)
            is_discrete = {other.name: other.family is not None for other in self.sites}
            discrete = [name for name in site.coupled if is_discrete[name]]
            continuous = [name for name in site.coupled if not is_discrete[name]]
            of_scale, _ = self._couplings(site, "log_scale_weights", discrete, 1, statements, drawn, within=False)
            of_discrete, _ = self._couplings(site, "loc_weights", discrete, 1, statements, drawn, within=False)
            of_continuous, within = self._couplings(site, "loc_couplings", continuous, 1, statements, drawn)

            ordered = gather(loc)
            for shift, factor in ((of_discrete, 1.0), (of_continuous, gather(gate))):
                if shift is not None:
                    ordered = ordered + factor * shift[..., 0]
            scale = jnp.broadcast_to(scale * jnp.exp(log_scale), shape)
            if of_scale is not None:
                scale = scale * site.elements.scatter(jnp.exp(of_scale[..., 0]), shape)
            if within is None:
                fn: dist.Distribution = dist.Normal(site.elements.scatter(ordered, shape), scale)
            else:
                fn = AutoregressiveNormal(ordered, gather(scale), gather(gate), within, site.elements, shape)
            transform = biject_to(site.site["fn"].support)
            fn = dist.TransformedDistribution(fn.to_event(event_dim), transform)
            value = statements.sample(site.name, fn)
        drawn.values[site.name] = value
        drawn.features[site.name] = (gather(gate) * gather(transform.inv(value)))[..., None]

    # Couplings.

    def _couplings(
        self,
        site: Site,
        suffix: str,
        parents: Iterable[str],
        num_shifts: int,
        statements: Statements,
        drawn: "_Drawn",
        within: bool = True,
    ) -> tuple[Array | None, Coupling | None]:
        """Shifts ``(*local, n, k)`` by earlier sites, and the couplings of the site's elements to each other."""
        features = {parent: drawn.features[parent] for parent in parents}
        sizes = [value.shape[-2] * value.shape[-1] for value in features.values()]
        full_shape = self._full_shape(site)
        n = site.elements.count(full_shape)
        num_features = 1 if site.family is None else site.family.num_features
        is_within = within and site.is_coupled_within and n > 1
        total = sum(sizes) + (n * num_features if is_within else 0)
        if not total:
            return None, None
        name = f"{site.name}_{self.prefix}_{suffix}"
        event_dim = site.event_dim + 2
        is_full = self.rank is None and np.prod(full_shape) * num_shifts * total <= FULL_ENTRIES
        gather = site.elements.gather
        if is_full:
            left = statements.param(name, jnp.zeros((*full_shape, num_shifts, total)), event_dim=event_dim)
            left = self.speed * gather(left)
            right = None
        else:
            rank = RANK if self.rank is None else self.rank
            left = statements.param(f"{name}_left", jnp.zeros((*full_shape, num_shifts, rank)), event_dim=event_dim)
            left = self.speed * gather(left)
            start = lambda key: jax.random.normal(key, (total, rank)) / rank**0.5  # noqa: E731
            right = statements.param(f"{name}_right", start)
        shift, begin = None, 0
        for size, value in zip(sizes, features.values()):
            flat = value.reshape(*value.shape[:-2], size)
            if right is None:
                part = jnp.einsum("...nkp,...p->...nk", left[..., begin : begin + size], flat)
            else:
                part = jnp.einsum("...nkr,...r->...nk", left, flat @ right[begin : begin + size])
            shift = part if shift is None else shift + part
            begin += size
        if not is_within:
            return shift, None
        if right is None:
            matrix = left[..., begin:]
            return shift, FullCoupling(matrix.reshape(*matrix.shape[:-1], n, num_features))
        return shift, LowRankCoupling(left, right[begin:].reshape(n, num_features, -1))

    def _full_shape(self, site: Site) -> tuple[int, ...]:
        start = next(iter(site.start.values()))
        return jnp.shape(start)[: jnp.ndim(start) - (0 if site.family is None else site.family.event_dim)]


@dataclass(frozen=True)
class _Drawn:
    """What has been drawn.

    :ivar values: of each site.
    :ivar features: for later sites, of shape ``(*local, n, f)``.
    """

    sampler: Sampler
    values: Samples
    features: Samples
    gates: Samples

    def own_features(self, site: Site, name: str) -> Array:
        """Features of a discrete site, element on element in the plates that both are in: of shape (*site, G)."""
        parent = next(other for other in self.sampler.sites if other.name == name)
        features = parent.family.features(self.values[name])
        dims = tuple(frame.dim for frame in parent.site["cond_indep_stack"])
        elements = Elements(features.ndim - 1 - parent.event_dim, parent.event_dim, dims)
        gathered = elements.gather(features)
        plates = gathered.shape[:-2]
        return gathered.reshape(*plates, *(1,) * site.event_dim, -1)

    def gate(self, site: Site, shape: tuple[int, ...]) -> Array:
        """0 for elements that a discrete site of the same shape switches off."""
        gate = jnp.ones(shape)
        for name, table in site.gates.items():
            parent = next(other for other in self.sampler.sites if other.name == name)
            low = getattr(parent.family, "low", 0)
            gate = gate * jnp.asarray(table, gate.dtype)[self.values[name] - low].reshape(
                *self.values[name].shape, *(1,) * (len(shape) - self.values[name].ndim)
            )
        return gate
