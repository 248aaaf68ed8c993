# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Automatic guides for models with discrete latents."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import jax
from jax import random
import jax.numpy as jnp
from jaxtyping import Array
import numpyro
from numpyro.distributions.util import periodic_repeat
from numpyro.handlers import block, seed, substitute, trace
from numpyro.infer import Predictive, init_to_median
from numpyro.infer.autoguide import (
    AutoDAIS,
    AutoGuide,
    AutoLaplaceApproximation,
    AutoNormal,
    AutoSemiDAIS,
    AutoSurrogateLikelihoodDAIS,
)

from numpyro_vimco.conditional_normal import ConditionalNormal
from numpyro_vimco.families import Family, family_of, has_common_bounds, jitter
from numpyro_vimco.sites import is_discrete, is_latent_site
from numpyro_vimco.validation import bounds_error, moving_continuous_error, moving_support_error, scan_plate_error


class _AutoGuide(AutoGuide):
    """An automatic guide that knows the structure of a model, but not its density, from which NumPyro sums discrete
    sites out.
    """

    def _trace_structure(self, model: Callable, *args, **kwargs) -> None:
        with block():
            self.prototype_trace = trace(model).get_trace(*args, **kwargs)
        sites = self.prototype_trace.values()
        frames = [frame for site in sites if is_latent_site(site) for frame in site["cond_indep_stack"]]
        self._prototype_frames = {frame.name: frame for frame in frames}
        self._prototype_frame_full_sizes = {site["name"]: site["args"][0] for site in sites if site["type"] == "plate"}
        for frame in frames:
            if frame.name not in self._prototype_frame_full_sizes:
                raise scan_plate_error(frame.name)
        self._prototype_arguments = args, kwargs

    def _moving_supports(self, names: Iterable[str], latents: dict[str, Array], *args, **kwargs) -> list[str]:
        """The sites whose support depends on latents: what depends on what `vmap` maps is a tracer."""
        moving: list[str] = []

        def find(latents):
            with block():
                tr = trace(substitute(seed(self.model, 0), data=latents)).get_trace(*args, **kwargs)
            leaves = {name: jax.tree.leaves(tr[name]["fn"].support) for name in names}
            moving.extend(n for n, found in leaves.items() if any(isinstance(leaf, jax.core.Tracer) for leaf in found))

        jax.vmap(find)(jax.tree.map(lambda value: value[None], latents))
        return moving

    def _with_deterministic(self, rng_key, params, samples, sample_shape, args, kwargs) -> dict[str, Array]:
        """Samples, and the deterministic sites that follow from them if they are all the latents."""
        sites = self.prototype_trace.values()
        names = [site["name"] for site in sites if site["type"] == "deterministic"]
        if not names or any(is_latent_site(site) and site["name"] not in samples for site in sites):
            return samples
        if not args and not kwargs:
            args, kwargs = self._prototype_arguments
        predict = Predictive(
            substitute(self.model, params), samples, return_sites=names, batch_ndims=len(sample_shape), parallel=True
        )
        return {**samples, **predict(rng_key, *args, **kwargs)}


class AutoDiscrete(_AutoGuide):
    r"""
    A mean-field guide over the discrete latent sites of a model: each element of each site is independent, in a
    family that its support decides.

    ============================================ =========================================== =========================
    support                                      guide                                       parameters
    ============================================ =========================================== =========================
    boolean                                      Bernoulli                                   ``{site}_{prefix}_logits``
    integers from low to high, categories        categorical, with a logit for each value    ``{site}_{prefix}_logits``
    integers from low on                         discretised logistic,                       ``{site}_{prefix}_loc``,
                                                 :class:`.distributions.DiscretizedLogistic` ``{site}_{prefix}_scale``
    ============================================ =========================================== =========================

    Counts have two parameters, a location above ``low`` and a scale: a posterior is often narrower than a Poisson
    distribution of its mean, which a negative binomial cannot be, or wider. Both are positive and optimised by their
    logarithm, so that a step is a fraction of what they are.

    The guide begins near the prior, given the values by ``init_loc_fn`` of what a site depends on, and slightly off: 1%
    of the probability is spread evenly over finite supports, so that each value is proposed at times, and parameters
    are moved by 0.1 standard normals in unconstrained space, so that symmetric models (mixtures) can leave the
    symmetric point. Supports are those of the first call's arguments. The guide of the continuous latents is another;
    :class:`AutoMixed` has both.

    :param callable model: a NumPyro model.
    :param str prefix: a prefix of the parameters' names. Defaults to ``"auto"``.
    :param callable init_loc_fn: a NumPyro initialization function. Where it has a value for a discrete site
        (``init_to_value(values={"z": 2})``), the guide begins there: with 90% of the probability if the support is
        finite, as its location if not. Defaults to :func:`numpyro.infer.init_to_median`, which has none, so that the
        guide begins at the prior given the medians of what it depends on.
    :param callable create_plates: as in NumPyro: returns the plates, for data subsampling.
    :raises ValueError: at the first call, if there is no discrete latent, if bounds of a support depend on other
        latents, differ between elements of a subsampled plate, or are traced.
    :raises NotImplementedError: at the first call, for a support without a family (multinomial): the message has a
        hand-written guide.

    Example::

        def model(x):
            with numpyro.plate("data", len(x)):
                z = numpyro.sample("z", dist.Categorical(jnp.array([0.5, 0.3, 0.2])))
                numpyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)

        guide = AutoDiscrete(model)
        result = SVI(model, guide, optax.adam(0.05), VIMCOStar()).run(random.key(0), 1000, x)
        guide.sample_posterior(random.key(1), result.params, sample_shape=(1000,))
    """

    def __init__(
        self,
        model: Callable,
        *,
        prefix: str = "auto",
        init_loc_fn: Callable = init_to_median,
        create_plates: Callable | None = None,
    ):
        super().__init__(model, prefix=prefix, init_loc_fn=init_loc_fn, create_plates=create_plates)
        self.families: dict[str, Family] = {}
        self._start: dict[str, dict[str, Array]] = {}

    def _setup_prototype(self, *args, **kwargs) -> None:
        rng_key, prior_key, start_key = random.split(numpyro.prng_key(), 3)
        given = {}

        def init(site):
            value = self.init_loc_fn(site)
            if value is not None and is_latent_site(site) and is_discrete(site):
                value = given[site["name"]] = jnp.broadcast_to(jnp.asarray(value), site["fn"].shape())
            return value

        model = substitute(seed(self.model, rng_key), substitute_fn=init)
        self._trace_structure(model, *args, **kwargs)
        sites = [site for site in self.prototype_trace.values() if is_latent_site(site) and is_discrete(site)]
        if not sites:
            raise ValueError(
                "The model has no discrete latent site for AutoDiscrete to guide. Use AutoMixed, or an automatic guide "
                "of NumPyro."
            )
        for i, site in enumerate(sites):
            name, event_dim = site["name"], site["fn"].event_dim
            self.families[name] = family = family_of(site, random.fold_in(prior_key, i))
            start = family.start(site, given.get(name))
            full = {k: self._full_size(site, value, event_dim + family.event_dim) for k, value in start.items()}
            self._start[name] = jitter(family, full, random.fold_in(start_key, i))
        self._check_bounds(*args, **kwargs)

    def _check_bounds(self, *args, **kwargs) -> None:
        """Raise for bounds that are not known for every element at every call."""
        latents = {name: site["value"] for name, site in self.prototype_trace.items() if is_latent_site(site)}
        for name in self._moving_supports(self.families, latents, *args, **kwargs):
            raise moving_support_error(name)
        for name, family in self.families.items():
            site = self.prototype_trace[name]
            subsampled = [f for f in site["cond_indep_stack"] if f.size != self._prototype_frame_full_sizes[f.name]]
            if subsampled and not has_common_bounds(family):
                raise bounds_error(site, f"differ between elements of the plate '{subsampled[0].name}', a subsample")

    def _full_size(self, site: dict, value: Array, event_dim: int) -> Array:
        """Repeat what is for a subsample, for the whole plate."""
        for frame in site["cond_indep_stack"]:
            size = self._prototype_frame_full_sizes[frame.name]
            if size != frame.size:
                value = periodic_repeat(value, size, frame.dim - event_dim)
        return value

    def __call__(self, *args, **kwargs) -> dict[str, Array]:
        """
        Sample the discrete sites.

        :return: the samples, keyed by site.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        result = {}
        for name, family in self.families.items():
            site = self.prototype_trace[name]
            event_dim = site["fn"].event_dim
            with ExitStack() as stack:
                for frame in site["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                params = {
                    k: numpyro.param(
                        f"{name}_{self.prefix}_{k}",
                        start,
                        constraint=family.constraints[k],
                        event_dim=event_dim + family.event_dim,
                    )
                    for k, start in self._start[name].items()
                }
                result[name] = numpyro.sample(name, family.distribution(**params).to_event(event_dim))
        return result

    def _params(self, name: str, params: dict[str, Any]) -> dict[str, Any]:
        return {k: params[f"{name}_{self.prefix}_{k}"] for k in self._start[name]}

    def sample_posterior(self, rng_key, params, *args, sample_shape=(), **kwargs) -> dict[str, Array]:
        """As in NumPyro. Deterministic sites are included if all latents of the model are discrete."""
        samples = {}
        for i, (name, family) in enumerate(self.families.items()):
            fn = family.distribution(**self._params(name, params))
            samples[name] = fn.sample(random.fold_in(rng_key, i), sample_shape)
        return self._with_deterministic(rng_key, params, samples, sample_shape, args, kwargs)

    def median(self, params) -> dict[str, Array]:
        """The smallest value of each element whose cumulative probability is at least ½."""
        return {name: values[0] for name, values in self.quantiles(params, [0.5]).items()}

    def quantiles(self, params, quantiles) -> dict[str, Array]:
        """The smallest value of each element whose cumulative probability is at least each of ``quantiles``."""
        q = jnp.asarray(quantiles)
        result = {}
        for name, family in self.families.items():
            ndim = jnp.ndim(self.prototype_trace[name]["value"])
            result[name] = family.quantile(q.reshape(-1, *(1,) * ndim), **self._params(name, params))
        return result


class AutoMixed(_AutoGuide):
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
            raise moving_continuous_error(name)
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
        """Medians of all latents, as the two guides have them."""
        self._check_marginals()
        return {name: value for part in self._parts for name, value in part.median(params).items()}

    def quantiles(self, params, quantiles) -> dict[str, Array]:
        """Quantiles of all latents, as the two guides have them."""
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
