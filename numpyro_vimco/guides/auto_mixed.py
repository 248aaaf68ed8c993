# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""An automatic guide for all latents, discrete and continuous."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
import numpyro
from numpyro.distributions import biject_to
from numpyro.handlers import block, mask, seed, trace
from numpyro.infer import init_to_median, init_to_value
from numpyro.infer.autoguide import (
    AutoDAIS,
    AutoGuide,
    AutoLaplaceApproximation,
    AutoNormal,
    AutoSemiDAIS,
    AutoSurrogateLikelihoodDAIS,
)

from numpyro_vimco.arguments import warn
from numpyro_vimco.compilation import at_once
from numpyro_vimco.control_flow import Given
from numpyro_vimco.families.components import Components, components_of_prior, spread_components
from numpyro_vimco.families.units import concrete, location_and_scale, prior_draws, unconstrained
from numpyro_vimco.guides.auto_discrete import AutoDiscrete
from numpyro_vimco.guides.automatic import AutoNormalFromPrior, is_normal, set_up, values_of
from numpyro_vimco.guides.least import Data, least_values
from numpyro_vimco.guides.options import (
    check_couplings,
    check_init_scale,
    check_num_components,
    check_structure,
)
from numpyro_vimco.guides.plan import begun_anew, conditional, continuous_sites, in_steps
from numpyro_vimco.guides.point_masses import check_no_point_mass
from numpyro_vimco.guides.structural import StructuralGuide
from numpyro_vimco.guides.structured import ContinuousSite, Sampler, Samples, Site
from numpyro_vimco.private.of_numpyro import setup_prototype, unconstrained_event_dim
from numpyro_vimco.randomness import split
from numpyro_vimco.sites import is_discrete, is_latent_site, log_prob_at_value, sample_sites

# Draws of hidden latents by which the density is seen to depend on them.
HIDDEN_DRAWS = 20


class AutoMixed(StructuralGuide):
    r"""
    A guide over all latents of a model, discrete and continuous, of one of three structures.

    **mean_field**: all elements are independent. Continuous latents have any automatic guide of NumPyro, discrete ones
    :class:`AutoDiscrete`. This is the cheapest structure, for posteriors with little dependence.

    **conditional**: continuous latents are Normal in unconstrained space, as in
    :class:`~numpyro.infer.autoguide.AutoNormal`, with a location and a scale that depend on discrete values, so that a
    spike and its slab can differ. An element depends on the discrete sites all of whose plates it is in too: on the
    same element of these plates, and along other dimensions on all elements.

    **autoregressive**: latents are drawn one after the other, each given those before it: discrete ones first. Let
    :math:`d_i` be the elements of discrete sites, :math:`f_j` their features, :math:`u_i` the elements of continuous
    sites in unconstrained space, and "own" the discrete values that :math:`u_i` depends on in *conditional*. Then

    .. math::

        \mathrm{logits\ of}\ d_i &= b_i + \kappa \sum_{j<i} W_{ij} f_j, \\
        u_i &\sim \mathrm{Normal}\Big( m_i(\mathrm{own}) + s_i(\mathrm{own}) \, \kappa g_i \sum_j A_{ij} f_j
               + \sigma_i \, \kappa g_i \sum_{j<i} B_{ij} g_j e_j, \;
               s_i(\mathrm{own}) \exp t \big( \kappa g_i \sum_j S_{ij} f_j \big) \Big), \\
        e_j &= (u_j - m_j(\mathrm{own})) / \sigma_j.

    (Derived in this project.) A is in units of the guide's own scale: a site that narrows takes it along. B is in units
    of the prior's scales :math:`\sigma`, as a narrow ridge would need a coupling without bound in units of its own
    scales. The feature of a boolean is its value. The features of a finite support are the indicators of its
    values. A count k above its smallest value has four: k, centred and scaled by the prior's median and scale;
    log(1 + k), less that of the median; 1 / (1 + k); and an indicator of 0. The feature of a continuous element is
    :math:`g_j e_j`. Counts have a W for the logarithm of the scale, and one for the location, where 1 stands for a
    scale (or for a factor of e, if that is less). In scales, and in the locations of other counts, a feature of a
    discrete element is cut off at 3: else they would grow exponentially with a count. And t(x) = 3 tanh(x / 3). Many
    elements may shift a scale by little each, and all together by so much that a rare draw overflows. "Own" values of
    several elements, or of more than two sites, shift the scale inside of t, not in s.

    g is 0 where the own values leave a latent without effect on all others, such as a coefficient that is multiplied by
    a switch that is off. The posterior of such a latent is its prior: it then follows only the sites that its prior
    depends on. Such values are found by evaluating the model at each. W, A, B and S begin at zero, where the guide is
    *conditional*, and learn by the factor :math:`\kappa` more slowly than the other parameters: couplings that learn as
    fast follow the first particle that does well, and lose modes.

    Latents are coupled as they are in the model given the data: two latents that share no factor, and that no later
    latent connects, have no coupling. Elements of a plate that share only latents outside of the plate are drawn
    independently given these. The number of parameters is then linear in the plate's size, and the plate may be
    subsampled or have `plate_particles`. Sites in such plates come after all others. A plate whose elements the data
    couple, such as predictors in one regression, is drawn element after element.

    The matrix of couplings of one site to all before it is full up to 131,072 entries (360 switches with each other).
    Beyond, it is a product of two matrices of rank 8, with about 16 parameters for each element; elements are dealt
    out to 8 blocks, and coupled to the elements of the blocks before their own. Drawing is compiled without a Python
    loop over elements: for continuous elements a triangular system is solved; discrete ones are iterated until they are
    what drawing one after the other would give.

    A site whose support depends on other latents comes after these, and its distribution is that of this support: a
    truncated Normal with a latent bound, a second change point after the first.

    Finite sites of the model that are marked ``infer={"enumerate": "parallel"}`` are left out, as the objectives sum
    them out. If all discrete sites are marked, the guide is that of the continuous ones.

    **Where a fit begins.** Discrete sites are near their prior, counts above what the data rule out
    (:class:`AutoDiscrete`). Continuous ones have the scale of their prior, times ``init_scale``, and a location from
    ``init_loc_fn``: about the prior's median. (For *mean_field* it is NumPyro's default, between -2 and 2 in
    unconstrained space.) A location far from the prior costs *autoregressive* effective sample size, as latents that
    are switched off have to find their prior again. Where the prior is far wider than the posterior, temper the
    likelihood (:func:`~numpyro_vimco.fit`), so that not all weight is with one particle.

    **Units.** A program in other units (kilometres for metres) has the same fit, up to rounding. A location is
    optimised in units of the prior's scale, which is half of the central 68% of draws of the prior in unconstrained
    space. :func:`~numpyro_vimco.fit` renews the unit at each step: it is the guide's own scale, or the prior's if that
    is smaller (``docs/mathematics.md``). Where another guide is given as ``continuous`` or ``discrete``, continuous
    latents keep NumPyro's units.

    **Mixture components.** One Normal cannot hold two humps. Where the prior of a continuous element is a finite
    mixture of up to 8 components, its guide is a mixture of as many Normals in unconstrained space, which begins at the
    prior's components. ``num_components`` asks for a number at any site: they begin side by side within the prior, and
    ``init_loc_fn`` does not move them. Couplings and "own" values shift and scale all components of an element alike,
    for later elements its e is in units of the prior, and elements of such a site have no couplings to each other. A
    mixture has no reparameterised draws, so that the site takes score-function gradients.

    :param callable model: a NumPyro model.
    :param continuous: an automatic guide of NumPyro for continuous latents, or a function from a model (and keyword
        arguments, if any are given here) to one, such as ``partial(AutoLowRankMultivariateNormal, rank=3)``. It sees
        the continuous latents only. Defaults to :class:`~numpyro.infer.autoguide.AutoNormal`, which it must be for all
        structures but mean_field.
    :param discrete: the same for discrete latents. Defaults to :class:`AutoDiscrete`.
    :param str structure: ``"mean_field"``, ``"conditional"`` or ``"autoregressive"``. Defaults to the last, which is
        nearest to the truth on all of five posteriors (``benchmarks/structures.py``); or to ``"mean_field"`` if
        ``continuous`` or ``discrete`` is given. Choose another where compilation is long (it grows with the number of
        sites), or where one pass over the data is all that there is time for.
    :param float coupling_speed: :math:`\kappa`. Defaults to 0.3. At 0.1 a coupling cannot get far enough in some
        thousand steps, which loses modes of change points; at 1 they are lost by chasing.
    :param int rank: rank of the matrices of couplings. Defaults to None: as above.
    :param float init_scale: scale of continuous latents where a fit begins, in units of the prior's scale. Defaults to
        1: the guide begins as wide as the prior. It has no effect where ``continuous`` is given.
    :param dict num_components: number of mixture components by site, ``{"mu": 2}``, of continuous latents and of
        counts. Defaults to that of the prior. It has no effect where another guide is given as ``continuous`` or
        ``discrete``.
    :param set chains: names of latents that the model draws inside of `scan`, one of each chain: ``{"count"}``. All
        latents of the scan are then drawn independently over time given the latents outside of it, as
        ``VIMCOStar(chain_particles={"count": 16})`` needs it. Each step has parameters of its own, and couplings to the
        latents outside, and of its latents to each other. Discrete ones begin near draws of the prior that are weighted
        by the data of their step. A count is never proposed below the least value that the data of the first call
        admit, where that is certain. Bounds that depend on other latents are not seen: impossible values have weight
        zero. Defaults to none: then a scan is drawn step after step, and a path is one value.
    :param kwargs: ``prefix``, ``init_loc_fn``, ``create_plates``: keyword arguments of both guides. Each
        has its own defaults; with a structure, ``init_loc_fn`` is :func:`~numpyro.infer.init_to_median`.
    :raises ValueError: for an unknown structure, a speed that is not positive, or a rank that is no positive integer;
        at the first call, for a model without latents, a prior with a point mass, a support that depends on latents
        that are not drawn first, a continuous guide that needs the model's density, or one that is not ``AutoNormal``
        with a structure; and as :class:`AutoDiscrete`.
    :warns UserWarning: at the first call, if ``structure="conditional"`` changes nothing.

    Example::

        def model(x, y):
            with numpyro.plate("predictor", x.shape[1]):
                included = numpyro.sample("included", dist.Bernoulli(0.3))
                slope = numpyro.sample("slope", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(x @ (included * slope), 1).to_event(1), obs=y)

        x = random.normal(random.key(1), (50, 3))
        svi = SVI(model, AutoMixed(model), optax.adam(0.01), VIMCOStar(0.5))
        posterior = fit(svi, random.key(0), 4000, x, x[:, 0])
    """

    def __init__(
        self,
        model: Callable,
        *,
        continuous: Callable = AutoNormal,
        discrete: Callable = AutoDiscrete,
        structure: str | None = None,
        coupling_speed: float = 0.3,
        rank: int | None = None,
        init_scale: float = 1.0,
        num_components: Mapping[str, int] = MappingProxyType({}),
        chains: Collection[str] = (),
        **kwargs,
    ):
        if isinstance(continuous, partial) and continuous.func is AutoNormal and structure is None:
            raise ValueError(
                f"`continuous` is {continuous!r}, whose latents would be independent of all others. Give the initial "
                "scale here, in units of the prior's: `AutoMixed(model, init_scale=0.2)`; or ask for independence: "
                '`structure="mean_field"`.'
            )
        if structure is None:  # the others need these two
            structure = "autoregressive" if continuous is AutoNormal and discrete is AutoDiscrete else "mean_field"
        if continuous is not AutoNormal and init_scale != 1.0:
            raise ValueError(
                f"`init_scale` is {init_scale!r}, but `continuous` is another guide, which takes its own: "
                "`continuous=partial(AutoMultivariateNormal, init_scale=0.1)`."
            )
        self.structure = check_structure(structure, ["mean_field", "conditional", "autoregressive"])
        if continuous is AutoNormal:  # NumPyro's default for the others is a uniform draw, in a unit of its own
            kwargs = {"init_loc_fn": init_to_median, **kwargs}
        super().__init__(model, chains, **kwargs)
        self.continuous, self.discrete = continuous, discrete
        self.coupling_speed, self.rank = check_couplings(coupling_speed, rank)
        self.init_scale, self.num_components = check_init_scale(init_scale), check_num_components(num_components)
        self._arguments = kwargs
        self._sites: list[Site] = []
        self._parts: list[AutoGuide] = []
        self.plates: dict[str, numpyro.plate] = {}

    def _setup_prototype(self, *args, **kwargs) -> None:
        # The structure is the same at each call, so that it depends on no key of the call.
        self._trace_structure(jax.random.key(0), *args, **kwargs)
        latents = [site for site in self.prototype_trace.values() if is_latent_site(site)]
        discrete = {site["name"]: site["value"] for site in latents if is_discrete(site)}
        continuous = {site["name"]: site["value"] for site in latents if not is_discrete(site)}
        if not latents:
            raise ValueError(
                "The model has no latent site for AutoMixed to guide: all are observed, or hidden by `block`. Call it "
                "without `obs` for what is to be inferred."
            )
        names = {**discrete, **continuous}
        for name in self.num_components.keys() - names.keys():
            raise ValueError(f"`num_components` names '{name}', but the latents are {', '.join(map(repr, names))}.")
        for name in continuous:
            check_no_point_mass(self.prototype_trace[name])
        arguments = self._arguments
        if given := values_of(self.init_loc_fn):
            # One value for each element: a guide of NumPyro has as many locations as it is given.
            values = {name: value for name, value in names.items() if name in given}
            arguments = {**arguments, "init_loc_fn": partial(init_to_value, values=values)}
        if discrete:
            independent: dict = {}
            if self.discrete is AutoDiscrete:
                independent = {"structure": "mean_field", "num_components": self.num_components}
            self._parts = [self.discrete(self.model, **independent, **arguments)]
            if isinstance(self._parts[0], AutoDiscrete):
                self._parts[0].part_of = self
        if continuous:
            model = self.model
            # The density at a draw of discrete sites, summed ones too, says nothing, and may be zero. That of the prior
            # alone is not needed.
            any_discrete = bool(discrete or self.model.hidden)
            if any_discrete:
                model = mask(block(Given(model, discrete), hide_fn=_is_beside_continuous), mask=False)
            scale = {"init_scale": self.init_scale} if self.continuous is AutoNormal else {}
            from_prior = self.continuous is AutoNormal and (any_discrete or self.homes or self.plates_in_scan)
            make = AutoNormalFromPrior if from_prior else self.continuous
            guide = make(model, **scale, **arguments)
            is_alone = not any_discrete and self.structure != "autoregressive"
            self._parts.append(guide if is_alone else _checked(guide, self.structure))
        for part in self._parts:
            try:
                set_up(part, *args, **kwargs)
            except RuntimeError:  # NumPyro finds no values that are possible
                if not self._has_hidden_latents(names, *args, **kwargs):
                    raise
                part.model = mask(block(part.model, hide_fn=_is_beside_continuous), mask=False)
                set_up(part, *args, **kwargs)
            if len(self._parts) == 2:
                part.create_plates = self._shared_plates
        in_parts = self.discrete is not AutoDiscrete or (continuous and not is_normal(self._parts[-1]))
        if not in_parts:
            self._structure_sites(discrete, continuous, *args, **kwargs)

    def check_arguments(self, *args, **kwargs) -> None:
        """
        Raise for arguments with which a count may be less than with those of the first call.

        :raises ValueError: naming the count; it is in a chain.
        """
        if not self.least:
            return
        before, now = jax.tree.leaves(self._prototype_arguments), jax.tree.leaves((args, kwargs))
        if len(before) == len(now) and all(map(np.array_equal, before, now)):
            return
        draws = {name: self.prior_draws[name] for name in self.least}
        least = least_values(Data.of(self.model, args, kwargs, self.prototype_trace), draws)
        for name, low in self.least.items():
            if name not in least or least[name].shape != low.shape or (least[name] < low).any():
                raise ValueError(
                    f"The guide was first called with other data, which rule out values of '{name}' that these data do "
                    "not: it would never propose them. Make a new guide for these data: AutoMixed(model, chains=…)."
                )

    def _has_hidden_latents(self, latents: Samples, *args, **kwargs) -> bool:
        """Whether densities depend on what the model draws and `block` hides: at one draw they then say nothing."""
        found = set()
        for key in split(jax.random.key(0), HIDDEN_DRAWS):
            with block():
                sites = sample_sites(trace(Given(seed(self.model, key), latents)).get_trace(*args, **kwargs))
            found.add(sum(float(jnp.sum(log_prob_at_value(site))) for site in sites))
        return len(found) > 1

    @contextmanager
    def _known_structure(self, args: tuple, kwargs: dict) -> Iterator[None]:
        with super()._known_structure(args, kwargs):
            # In each start of a fit a continuous part is without a prototype: where it begins depends on the key.
            for part in self._parts:
                if part.prototype_trace is None:
                    setup_prototype(part, *args, **kwargs)
                    self._sites = begun_anew(self._sites, part) if self._sites else []
            yield

    def _structure_sites(self, discrete: Samples, continuous: Samples, *args, **kwargs) -> None:
        """Set ``_sites``: the sites of a guide with dependences, and what each depends on."""
        sites = self._parts[0].sites if discrete else []
        if continuous:
            units = self._units(continuous, *args, **kwargs)
            sites = [*sites, *continuous_sites(self._parts[-1], units, self._components(continuous, units))]
        sites = in_steps(sites, self.homes)
        if self.structure == "mean_field":
            self._sites = sites
            return
        if self.structure == "autoregressive":
            self._sites = self._couple(sites, *args, **kwargs)
            return
        self._sites = conditional(sites)
        if not any(isinstance(site, ContinuousSite) and site.own for site in self._sites):
            why = "each discrete site is in a plate that no continuous site is in"
            if not discrete or not continuous:
                why = f"the model has no {'continuous' if discrete else 'discrete'} latent"
            warn(f"structure='conditional' changes nothing: {why}. Leave it out.")
            self._sites = []

    def _units(self, names: Iterable[str], *args, **kwargs) -> dict[str, tuple[Any, Any]]:
        """Location and scale of the prior of continuous sites, in unconstrained space and for full plates."""

        def units() -> dict[str, list[Array]]:
            found = {}
            for name, draws in prior_draws(self.model, args, kwargs, names, unconstrained).items():
                site = self.prototype_trace[name]
                both = location_and_scale(draws)
                event_dim = unconstrained_event_dim(self._parts[-1], name)
                found[name] = [self._full_size(site, x, event_dim) for x in both]
            return found

        return {name: (concrete(location), concrete(scale)) for name, (location, scale) in at_once(units).items()}

    def _components(self, names: Iterable[str], units: Mapping[str, tuple[Array, Array]]) -> dict[str, Components]:
        """Where mixture components begin, of continuous sites with a prior of several humps, or where asked for."""

        def components() -> dict[str, Components]:
            found = {}
            for name in names:
                site = self.prototype_trace[name]
                number = self.num_components.get(name)
                if number is None:
                    begin = components_of_prior(site, biject_to(site["fn"].support).inv)
                else:
                    begin = spread_components(*units[name], number) if number > 1 else None
                if begin is not None:
                    event_dim = unconstrained_event_dim(self._parts[-1], name) + 1
                    found[name] = Components(*(self._full_size(site, x, event_dim) for x in begin))
            return found

        return at_once(components)

    def _sampler(self, args: tuple, kwargs: dict) -> Sampler:
        support = self._support_at(args, kwargs)
        return Sampler(tuple(self._sites), self.prefix, self.coupling_speed, self.rank, support)

    def _forget(self) -> None:
        super()._forget()
        self._parts, self._sites, self.plates = [], [], {}

    def _shared_plates(self, *args, **kwargs) -> list[numpyro.plate]:
        """The plates of this call, for both guides: they must see the same subsample."""
        return list(self.plates.values())

    def __call__(self, *args, **kwargs) -> dict[str, Array]:
        """
        Sample all latents.

        :return: the samples, keyed by site.
        """
        with self._known_structure(args, kwargs):
            if self._sites:
                return self._draw_in_guide(self._sampler(args, kwargs), *args, **kwargs)
            if len(self._parts) == 1:
                return self._parts[0](*args, **kwargs)
            self.plates = self._plates_of_call(*args, **kwargs)
            try:
                return {name: value for part in self._parts for name, value in part(*args, **kwargs).items()}
            finally:
                self.plates = {}  # a subsample is of this call alone

    def sample_posterior(self, rng_key, params, *args, sample_shape=(), **kwargs) -> dict[str, Array]:
        """As in NumPyro, with deterministic sites."""
        with self._known_structure(args, kwargs):
            if not self._sites and len(self._parts) == 1:
                return self._parts[0].sample_posterior(rng_key, params, *args, sample_shape=sample_shape, **kwargs)
            *keys, rng_key = split(rng_key, 3)
            if self._sites:
                samples = self._draw_at_params(self._sampler(args, kwargs), keys[0], params, sample_shape)
            else:
                samples = {}
                for part, key in zip(self._parts, keys):
                    samples |= part.sample_posterior(key, params, *args, sample_shape=sample_shape, **kwargs)
            return self._with_deterministic(rng_key, params, samples, sample_shape, args, kwargs)

    def median(self, params) -> dict[str, Array]:
        """Medians of all latents, each by its own guide.

        :raises NotImplementedError: where latents depend on each other: a mixture has no closed quantiles.
        """
        with self._known_structure((), {}):
            self._check_marginals(self._sites)
            return {name: value for part in self._parts for name, value in part.median(params).items()}

    def quantiles(self, params, quantiles) -> dict[str, Array]:
        """Quantiles of all latents, each by its own guide.

        :raises NotImplementedError: as :meth:`median`.
        """
        with self._known_structure((), {}):
            self._check_marginals(self._sites)
            return {name: value for part in self._parts for name, value in part.quantiles(params, quantiles).items()}


def _is_beside_continuous(site: dict) -> bool:
    """Whether a site is to be hidden from a continuous guide, which sees continuous latents, plates and parameters."""
    return site["type"] == "deterministic" or (site["type"] == "sample" and (site["is_observed"] or is_discrete(site)))


def _checked(guide: AutoGuide, structure: str) -> AutoGuide:
    name = type(guide).__name__
    if isinstance(guide, AutoDAIS | AutoSemiDAIS | AutoSurrogateLikelihoodDAIS | AutoLaplaceApproximation):
        raise ValueError(
            f"`continuous` is {name}, which needs the model's density as a function of the continuous latents alone. "
            "Use AutoNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal, a flow, or AutoDelta."
        )
    if structure != "mean_field" and not is_normal(guide):
        raise ValueError(
            f"With structure='{structure}' `continuous` must be AutoNormal, but it is {name}. Leave `continuous` out, "
            "or use structure='mean_field'."
        )
    return guide
