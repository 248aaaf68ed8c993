# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""An automatic guide for discrete latents."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from numpyro.infer import init_to_median

from numpyro_vimco.compilation import at_once
from numpyro_vimco.families.families import Family, bounds_error, family_of, has_common_bounds, with_prior_draws
from numpyro_vimco.guides.options import check_couplings, check_num_components, check_structure
from numpyro_vimco.guides.plan import discrete_sites
from numpyro_vimco.guides.structural import StructuralGuide
from numpyro_vimco.guides.structured import Sampler, Site
from numpyro_vimco.randomness import split, split_by_name
from numpyro_vimco.sites import is_discrete, is_latent_site


class AutoDiscrete(StructuralGuide):
    r"""
    A guide over the discrete latent sites of a model, each element in a family that its support decides.

    ============================================ =========================================== =========================
    support                                      guide                                       parameters
    ============================================ =========================================== =========================
    boolean                                      Bernoulli                                   ``{site}_{prefix}_logits``
    integers from low to high, categories        categorical, with a logit for each value    ``{site}_{prefix}_logits``
    integers from low on                         discretised logistic,                       ``{site}_{prefix}_loc``,
                                                 :class:`.distributions.DiscretizedLogistic` ``{site}_{prefix}_scale``
    counts with a given sum (Multinomial)        the same, one after the other, each at most the same
                                                 what is left; the last one takes the rest
    ============================================ =========================================== =========================

    With ``structure="mean_field"`` all elements are independent. With ``"autoregressive"`` they are drawn one after the
    other, each given those before it that the model couples it to: :class:`AutoMixed` has the formula.

    Counts have two parameters, a location above ``low`` and a scale: a posterior is often narrower than a Poisson
    distribution of its mean, which a negative binomial cannot be, or wider. Both are positive, and optimised by their
    logarithm. A step moves the scale by a share of itself. It moves the location by a share of the scale, and at most
    by a share of itself: by a share of itself alone, a large count would leave what the data allow. (The scale is that
    of the prior; in :func:`~numpyro_vimco.fit`, the guide's own.)

    A count whose prior is a mixture of up to 8 components has a guide of as many, and one that is inflated at zero has
    a guide of two: a mixture of discretised logistic distributions, with ``{site}_{prefix}_logits`` for their weights.
    They begin at the prior's components. ``num_components`` asks for a number at any count: these begin side by side
    within the prior.

    Where a support depends on other latents, ``"autoregressive"`` draws these first, and cuts the distribution to what
    is possible given their values. Other structures propose all values that the site can ever have: such an interval
    has a table if these latents have up to 4,096 values together, and else no upper end.

    The guide begins near the prior of each site, at the values that ``init_loc_fn`` gives to the latents that the site
    depends on. It differs from the prior in three ways. Where the data of the first call rule out small counts (5 were
    seen, so that 3 is impossible), it begins above these. 1% of the probability is spread evenly over finite supports,
    so that each value is proposed at times. Parameters are moved by 0.1 standard normals in unconstrained space, so
    that symmetric models (mixtures) can leave the symmetric point; only these moves depend on the key of the fit.
    Supports are those of the first call's arguments. Continuous latents need another guide; :class:`AutoMixed` has
    both. Sites that are marked ``infer={"enumerate": "parallel"}`` are left out: the objectives sum them out.

    :param callable model: a NumPyro model.
    :param str prefix: a prefix of the parameters' names. Defaults to ``"auto"``.
    :param str structure: ``"mean_field"`` or ``"autoregressive"``. Defaults to ``"autoregressive"``: sites that share
        nothing given the data are independent in it too.
    :param float coupling_speed: factor on couplings, so that they learn more slowly than the rest. Defaults to 0.3, as
        in :class:`AutoMixed`.
    :param int rank: rank of the matrices of couplings. Defaults to None: full up to 131,072 entries of one
        site, 8 beyond.
    :param dict num_components: number of mixture components by site, ``{"count": 2}``, of counts; 2 or more. Defaults
        to that of the prior. Finite supports need none.
    :param callable init_loc_fn: a NumPyro initialization function. Where it has a value for a discrete site
        (``init_to_value(values={"z": 2})``: one for all elements, or one for each; inside of ``scan`` the first
        dimension is time), the guide begins there: with 90% of the probability if the support is finite, as its
        location if not (mixture components stay where they are). Defaults to :func:`numpyro.infer.init_to_median`,
        which has no values for discrete sites, so that the guide begins at the prior given the medians of the other
        latents.
    :param callable create_plates: as in NumPyro: returns the plates, for data subsampling.
    :raises ValueError: for an unknown structure, a speed that is not positive, or a rank that is no positive integer;
        at the first call, if there is no discrete latent, or if bounds of a support depend on other latents that are
        not drawn first, differ between elements of a subsampled plate, or are traced.
    :raises NotImplementedError: at the first call, for a support without a family: the message has a hand-written
        guide.

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
        structure: str = "autoregressive",
        coupling_speed: float = 0.3,
        rank: int | None = None,
        num_components: Mapping[str, int] = MappingProxyType({}),
        init_loc_fn: Callable = init_to_median,
        create_plates: Callable | None = None,
    ):
        super().__init__(model, prefix=prefix, init_loc_fn=init_loc_fn, create_plates=create_plates)
        self.structure = check_structure(structure, ["mean_field", "autoregressive"])
        self.coupling_speed, self.rank = check_couplings(coupling_speed, rank)
        self.num_components = check_num_components(num_components)
        self.part_of: StructuralGuide | None = None  # a guide of the same model that knows its structure
        self.families: dict[str, Family] = {}
        self._start: dict[str, dict[str, Array]] = {}
        self.sites: list[Site] = []

    def _setup_prototype(self, *args, **kwargs) -> None:
        # The structure is the same at each call, so that it depends on no key of the call.
        keys = split_by_name(jax.random.key(0), ["model", "priors"])
        if self.part_of is None:
            self._trace_structure(keys["model"], *args, **kwargs)
        else:
            self.take_structure(self.part_of)
        known = self.part_of or self
        sites = [
            with_prior_draws(site, known.prior_draws, known.covers)
            for site in self.prototype_trace.values()
            if is_latent_site(site) and is_discrete(site)
        ]
        if not sites:
            raise ValueError(
                "The model has no discrete latent site for AutoDiscrete to guide. Use AutoMixed, or an automatic guide "
                "of NumPyro."
            )
        prior_keys = split_by_name(keys["priors"], [site["name"] for site in sites])
        for site in sites:
            name = site["name"]
            self.families[name] = family_of(site, prior_keys[name], self.num_components.get(name))

        def start(site: dict) -> dict[str, Array]:
            family = self.families[site["name"]]
            found = family.start(site, site["value"] if site["name"] in self.begun else None)
            if site["name"] in known.above_least:
                above = known.above_least[site["name"]] - family.low
                found["loc"] = jnp.maximum(found["loc"], above.reshape(above.shape + (1,) * family.event_dim))
            event_dim = site["fn"].event_dim + family.event_dim
            return {k: self._full_size(site, v, event_dim) for k, v in found.items()}

        self._start = at_once(lambda: {site["name"]: start(site) for site in sites})
        self._check_bounds()
        self.sites = discrete_sites(self.prototype_trace, self.families, self._start)
        if self.structure == "autoregressive":
            self.sites = self._couple(self.sites, *args, **kwargs)

    def _forget(self) -> None:
        super()._forget()
        self.families, self._start, self.sites = {}, {}, []

    def _sampler(self, args: tuple, kwargs: dict) -> Sampler:
        support = self._support_at(args, kwargs)
        return Sampler(tuple(self.sites), self.prefix, self.coupling_speed, self.rank, support)

    def _check_bounds(self) -> None:
        """Raise for bounds that are not known for every element at every call."""
        for name, family in self.families.items():
            site = self.prototype_trace[name]
            if (plate := self._subsampled(site)) and not has_common_bounds(family):
                raise bounds_error(site, f"differ between elements of the plate '{plate}', a subsample")

    def __call__(self, *args, **kwargs) -> dict[str, Array]:
        """
        Sample the discrete sites.

        :return: the samples, keyed by site.
        """
        with self._known_structure(args, kwargs):
            return self._draw_in_guide(self._sampler(args, kwargs), *args, **kwargs)

    def _params(self, name: str, params: dict[str, Any]) -> dict[str, Any]:
        return {k: params[f"{name}_{self.prefix}_{k}"] for k in self._start[name]}

    def sample_posterior(self, rng_key, params, *args, sample_shape=(), **kwargs) -> dict[str, Array]:
        """As in NumPyro. Deterministic sites are included if all latents of the model are discrete."""
        with self._known_structure(args, kwargs):
            draw_key, rng_key = split(rng_key)
            samples = self._draw_at_params(self._sampler(args, kwargs), draw_key, params, sample_shape)
            return self._with_deterministic(rng_key, params, samples, sample_shape, args, kwargs)

    def median(self, params) -> dict[str, Array]:
        """The smallest value of each element whose cumulative probability is at least ½.

        :raises NotImplementedError: as :meth:`quantiles`.
        """
        return {name: values[0] for name, values in self.quantiles(params, [0.5]).items()}

    def quantiles(self, params, quantiles) -> dict[str, Array]:
        """The smallest value of each element whose cumulative probability is at least each of ``quantiles``.

        :raises NotImplementedError: where elements depend on each other: a mixture has no closed quantiles.
        """
        q = np.asarray(quantiles)
        result = {}
        with self._known_structure((), {}):
            self._check_marginals(self.sites)
            for name, family in self.families.items():
                ndim = jnp.ndim(self.prototype_trace[name]["value"])
                result[name] = family.quantile(q.reshape(-1, *(1,) * ndim), **self._params(name, params))
        return result
