# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""An automatic guide for all latents, discrete and continuous."""

from collections.abc import Callable

from jax import random
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

from numpyro_vimco.guides.auto_discrete import AutoDiscrete, StructuralGuide
from numpyro_vimco.guides.conditional_normal import ConditionalNormal
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
        self._trace_structure(seed(self.model, 0), *args, **kwargs)
        latents = [site for site in self.prototype_trace.values() if is_latent_site(site)]
        discrete = {site["name"]: site["value"] for site in latents if is_discrete(site)}
        if not latents:
            raise ValueError(
                "The model has no latent site for AutoMixed to guide: all are observed, or hidden by `block`. Call it "
                "without `obs` for what is to be inferred."
            )
        if not discrete:
            self._parts = [self.continuous(self.model, **self._arguments)]
            return
        continuous = [site["name"] for site in latents if not is_discrete(site)]
        for name in self._moving_supports(continuous, discrete, *args, **kwargs):
            raise ValueError(
                f"The support of the continuous site '{name}' depends on a discrete latent, so that no automatic guide "
                "can know it. Write the model with a site whose support is fixed (Uniform(0, 1), say) and scale it, or "
                "write a guide by hand for this site; "
                f"AutoMixed(numpyro.handlers.block(model, hide=['{name}'])) can guide the others."
            )
        self._parts = [self.discrete(self.model, **self._arguments)]
        if continuous:
            model = block(substitute(self.model, data=discrete), hide_fn=_is_beside_continuous)
            self._parts.append(_checked(self.continuous(model, **self._arguments), self.conditional))
            for part in self._parts:
                part.create_plates = self._shared_plates

    def _shared_plates(self, *args, **kwargs) -> list[numpyro.plate]:
        """The plates of this call: both guides must see the same subsample."""
        return list(self.plates.values())

    def __call__(self, *args, **kwargs) -> dict[str, Array]:
        """
        Sample all latents.

        :return: the samples, keyed by site.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        if len(self._parts) == 1:
            return self._parts[0](*args, **kwargs)
        self.plates = self._create_plates(*args, **kwargs)
        discrete, continuous = self._parts
        samples = discrete(*args, **kwargs)
        if not self.conditional:
            return {**samples, **continuous(*args, **kwargs)}
        if continuous.prototype_trace is None:
            continuous._setup_prototype(*args, **kwargs)
        return {**samples, **self._given_discrete().sample(self.plates, samples)}

    def _given_discrete(self) -> ConditionalNormal:
        discrete, continuous = self._parts
        return ConditionalNormal(continuous, discrete.prototype_trace, discrete.families)

    def sample_posterior(self, rng_key, params, *args, sample_shape=(), **kwargs) -> dict[str, Array]:
        """As in NumPyro, with deterministic sites."""
        if len(self._parts) == 1:
            return self._parts[0].sample_posterior(rng_key, params, *args, sample_shape=sample_shape, **kwargs)
        discrete, continuous = self._parts
        discrete_key, continuous_key, rng_key = random.split(rng_key, 3)
        samples = discrete.sample_posterior(discrete_key, params, sample_shape=sample_shape)
        if not self.conditional:
            samples.update(
                continuous.sample_posterior(continuous_key, params, *args, sample_shape=sample_shape, **kwargs)
            )
        else:
            samples.update(self._given_discrete().sample_posterior(continuous_key, params, samples, sample_shape))
        return self._with_deterministic(rng_key, params, samples, sample_shape, args, kwargs)

    def median(self, params) -> dict[str, Array]:
        """Medians of all latents, as the two guides have them.

        :raises NotImplementedError: with ``conditional=True``: a mixture has no closed quantiles.
        """
        self._check_marginals()
        return {name: value for part in self._parts for name, value in part.median(params).items()}

    def quantiles(self, params, quantiles) -> dict[str, Array]:
        """Quantiles of all latents, as the two guides have them.

        :raises NotImplementedError: as :meth:`median`.
        """
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
