# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""An automatic guide for all latents, discrete and continuous."""

from collections.abc import Callable, Iterable
import warnings

import jax
from jaxtyping import Array
import numpyro
from numpyro.handlers import block, seed, substitute
from numpyro.infer.autoguide import (
    AutoDAIS,
    AutoGuide,
    AutoLaplaceApproximation,
    AutoNormal,
    AutoSemiDAIS,
    AutoSurrogateLikelihoodDAIS,
)

from numpyro_vimco.guides.auto_discrete import AutoDiscrete
from numpyro_vimco.guides.conditional_normal import ConditionalNormal, Samples
from numpyro_vimco.guides.point_masses import check_no_point_mass
from numpyro_vimco.guides.private import set_up
from numpyro_vimco.guides.structural import StructuralGuide
from numpyro_vimco.randomness import split
from numpyro_vimco.sites import is_discrete, is_latent_site


class AutoMixed(StructuralGuide):
    r"""
    A guide over all latents of a model: an automatic guide of NumPyro for the continuous ones, and
    :class:`AutoDiscrete` for the discrete ones.

    With ``conditional=True`` the continuous latents are Normal in unconstrained space, as in
    :class:`~numpyro.infer.autoguide.AutoNormal`, with location and logarithm of the scale affine in the discrete
    values, so that a spike and its slab can differ: for an element u of a continuous site, and the features f of the
    discrete values that it depends on,

    .. math:: u \sim \mathrm{Normal}(loc + A f, \; scale \cdot e^{B f}).

    The feature of a boolean is its value; of a finite support, an indicator of each value; of a count, its value,
    centred and scaled by the prior's median and scale. A continuous site depends on the discrete sites that are in no
    plate that it is not in itself: in a plate that both are in, element on element; else on all elements. So the number
    of parameters is linear in the size of the plates, and plates may be subsampled or have `plate_particles`. A and B
    begin at zero.

    A model without discrete latents gets exactly the continuous guide, one without continuous ones the discrete guide.

    :param callable model: a NumPyro model.
    :param continuous: an automatic guide of NumPyro for continuous latents, or a function from a model (and keyword
        arguments, if any are given here) to one, such as ``partial(AutoNormal, init_scale=0.01)``. It sees the
        continuous latents only. Defaults to :class:`~numpyro.infer.autoguide.AutoNormal`.
    :param discrete: the same for discrete latents. Defaults to :class:`AutoDiscrete`.
    :param bool conditional: whether continuous latents depend on discrete ones in the guide. Defaults to False: it
        is for models in which a discrete value changes what a continuous latent means.
    :param kwargs: ``prefix``, ``init_loc_fn``, ``create_plates``: keyword arguments of both guides. Each
        has its own defaults.
    :raises ValueError: at the first call, for a model without latents, a continuous guide that needs the model's
        density, or one that is not ``AutoNormal`` with ``conditional=True``; and as :class:`AutoDiscrete`.

    Example::

        def model(x, y):
            with numpyro.plate("predictor", x.shape[1]):
                included = numpyro.sample("included", dist.Bernoulli(0.3))
                slope = numpyro.sample("slope", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(x @ (included * slope), 1).to_event(1), obs=y)

        guide = AutoMixed(model, conditional=True)
        result = SVI(model, guide, optax.adam(0.01), VIMCOStar()).run(random.key(0), 2000, x, y)
    """

    def __init__(
        self,
        model: Callable,
        *,
        continuous: Callable = AutoNormal,
        discrete: Callable = AutoDiscrete,
        conditional: bool = False,
        **kwargs,
    ):
        super().__init__(model, **kwargs)
        self.continuous, self.discrete, self.conditional = continuous, discrete, conditional
        self._arguments = kwargs
        self._parts: list[AutoGuide] = []
        self.plates: dict[str, numpyro.plate] = {}

    def _setup_prototype(self, *args, **kwargs) -> None:
        # The structure is the same at each call, so that it depends on no key of the call.
        model = substitute(seed(self.model, jax.random.key(0)), substitute_fn=self.init_loc_fn)
        self._trace_structure(model, *args, **kwargs)
        latents = [site for site in self.prototype_trace.values() if is_latent_site(site)]
        discrete = {site["name"]: site["value"] for site in latents if is_discrete(site)}
        continuous = {site["name"]: site["value"] for site in latents if not is_discrete(site)}
        if not latents:
            raise ValueError(
                "The model has no latent site for AutoMixed to guide: all are observed, or hidden by `block`. Call it "
                "without `obs` for what is to be inferred."
            )
        self._check_continuous(continuous, {**discrete, **continuous}, *args, **kwargs)
        if discrete:
            self._parts = [self.discrete(self.model, **self._arguments)]
        if continuous:
            model = self.model
            if discrete:
                model = block(substitute(model, data=discrete), hide_fn=_is_beside_continuous)
            guide = self.continuous(model, **self._arguments)
            self._parts.append(_checked(guide, self.conditional) if discrete else guide)
        for part in self._parts:
            set_up(part, *args, **kwargs)
            if len(self._parts) == 2:
                part.create_plates = self._shared_plates
        if self.conditional:
            self._warn_if_independent(discrete, continuous)

    def _check_continuous(self, names: Iterable[str], latents: Samples, *args, **kwargs) -> None:
        """Raise for continuous sites that no Normal in a fixed unconstrained space can propose."""
        for name in names:
            check_no_point_mass(self.prototype_trace[name])
        for name in self._moving_supports(names, latents, *args, **kwargs):
            raise ValueError(
                f"The support of the continuous site '{name}' depends on another latent, so that no automatic guide "
                "can know it. Write the model with a site whose support is fixed (Uniform(0, 1), say) and scale it, or "
                "write a guide by hand for this site; "
                f"AutoMixed(numpyro.handlers.block(model, hide=['{name}'])) can guide the others."
            )

    def _warn_if_independent(self, discrete: Samples, continuous: Samples) -> None:
        if not discrete or not continuous:
            why = f"the model has no {'continuous' if discrete else 'discrete'} latent"
        elif self._given_discrete().is_independent():
            why = "each discrete site is in a plate that no continuous site is in"
        else:
            return
        warnings.warn(f"conditional=True changes nothing: {why}. Leave it out.", stacklevel=2)

    def _forget(self) -> None:
        super()._forget()
        self._parts, self.plates = [], {}

    def _shared_plates(self, *args, **kwargs) -> list[numpyro.plate]:
        """The plates of this call: both guides must see the same subsample."""
        return list(self.plates.values())

    def __call__(self, *args, **kwargs) -> dict[str, Array]:
        """
        Sample all latents.

        :return: the samples, keyed by site.
        """
        with self._known_structure(args, kwargs):
            if len(self._parts) == 1:
                return self._parts[0](*args, **kwargs)
            discrete, continuous = self._parts
            given_discrete = self._given_discrete()
            self.plates = self._plates_of_call(*args, **kwargs)
            try:
                samples = discrete(*args, **kwargs)
                if self.conditional:
                    return {**samples, **given_discrete.sample(self.plates, samples)}
                return {**samples, **continuous(*args, **kwargs)}
            finally:
                self.plates = {}  # a subsample is of this call alone

    def _given_discrete(self) -> ConditionalNormal:
        discrete, continuous = self._parts
        return ConditionalNormal(
            continuous, {name: discrete.prototype_trace[name] for name in discrete.families}, discrete.families
        )

    def sample_posterior(self, rng_key, params, *args, sample_shape=(), **kwargs) -> dict[str, Array]:
        """As in NumPyro, with deterministic sites."""
        with self._known_structure(args, kwargs):
            if len(self._parts) == 1:
                return self._parts[0].sample_posterior(rng_key, params, *args, sample_shape=sample_shape, **kwargs)
            discrete, continuous = self._parts
            given_discrete = self._given_discrete()
            discrete_key, continuous_key, rng_key = split(rng_key, 3)
            samples = discrete.sample_posterior(discrete_key, params, *args, sample_shape=sample_shape, **kwargs)
            if self.conditional:
                samples.update(given_discrete.sample_posterior(continuous_key, params, samples, sample_shape))
            else:
                samples.update(
                    continuous.sample_posterior(continuous_key, params, *args, sample_shape=sample_shape, **kwargs)
                )
            return self._with_deterministic(rng_key, params, samples, sample_shape, args, kwargs)

    def median(self, params) -> dict[str, Array]:
        """Medians of all latents, as the two guides have them.

        :raises NotImplementedError: with ``conditional=True``: a mixture has no closed quantiles.
        """
        with self._known_structure((), {}):
            self._check_marginals()
            return {name: value for part in self._parts for name, value in part.median(params).items()}

    def quantiles(self, params, quantiles) -> dict[str, Array]:
        """Quantiles of all latents, as the two guides have them.

        :raises NotImplementedError: as :meth:`median`.
        """
        with self._known_structure((), {}):
            self._check_marginals()
            return {name: value for part in self._parts for name, value in part.quantiles(params, quantiles).items()}

    def _check_marginals(self) -> None:
        if self.conditional and len(self._parts) == 2:
            raise NotImplementedError(
                "With conditional=True the marginal of a continuous latent is a mixture over the discrete values, and "
                "has no closed quantiles. Use those of `sample_posterior(rng_key, params, sample_shape=(10_000,))`."
            )


def _is_beside_continuous(site: dict) -> bool:
    """What a continuous guide must not see: all but continuous latents, plates and parameters."""
    return site["type"] == "deterministic" or (site["type"] == "sample" and (site["is_observed"] or is_discrete(site)))


def _checked(guide: AutoGuide, conditional: bool) -> AutoGuide:
    name = type(guide).__name__
    if isinstance(guide, AutoDAIS | AutoSemiDAIS | AutoSurrogateLikelihoodDAIS | AutoLaplaceApproximation):
        raise ValueError(
            f"`continuous` is {name}, which needs the model's density as a function of the continuous latents alone. "
            "Use AutoNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal, a flow, or AutoDelta."
        )
    if conditional and type(guide) is not AutoNormal:
        raise ValueError(
            f"With conditional=True `continuous` must be AutoNormal, but it is {name}. Leave `continuous` out, or use "
            "conditional=False."
        )
    return guide
