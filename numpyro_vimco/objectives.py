# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Importance-weighted objectives for :class:`numpyro.infer.SVI`."""

from collections.abc import Callable
from functools import partial
from numbers import Real
import operator
from typing import Any

import jax
from jax import random
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro.handlers import seed
from numpyro.infer.elbo import ELBO

from numpyro_vimco import control_variates
from numpyro_vimco.control_variates import LogWeights, PerParticle
from numpyro_vimco.densities import Densities, is_latent_site, is_score_function_site, particle_densities


class ImportanceWeightedELBO(ELBO):
    r"""
    Base class of the objectives of this package: the VR-IWAE bound [1],

    .. math::

        L = \frac{1}{1-\alpha} E_{z_1, \dots, z_N \sim q} \Big[
            \log \frac1N \sum_{j=1}^N \Big( \frac{p(x, z_j)}{q(z_j)} \Big)^{1-\alpha} \Big],

    with gradients through the samples of guide sites that have a reparameterised sampler, and score-function
    gradients for those that have none (discrete sites, mixtures, von Mises, Wishart, …). ``loss`` is the
    negative of the estimate in nats, as in :class:`numpyro.infer.RenyiELBO`.

    A subclass is an estimator. It defines :meth:`score_signal`, a pure function of the log-weights::

        class MyEstimator(ImportanceWeightedELBO):
            def score_signal(self, log_weights):
                return control_variates.vimco_star_signal(log_weights, self.alpha)

    **Plates.** If plates are common to all sample sites of model and guide, each of their elements has a bound
    of its own, with its own weights, and the objective is their sum; if they are subsampled, it is scaled.
    Other plates are summed into one weight, and cannot be subsampled.

    **Scale and mask.** `handlers.scale` multiplies a site's log-density in the weight; the gradient is that of
    this scaled objective, with the score of the density that the sample was drawn from. `handlers.mask`
    takes elements of a site out of the program: they have neither a density nor a score.

    **Zero weights.** Where all particles of an element have weight zero, the loss is ``inf`` and the gradient 0.
    NaN log-weights give a NaN loss.

    :param float alpha: order α of the bound, in [0, 1]: 0 is the importance-weighted bound (IWAE), tightest for
        a given number of particles; 1 is the ELBO. Defaults to 0.
    :param int num_particles: number N of particles, at least 2. Defaults to 16: the estimators use the other
        particles as a baseline, and the bound tightens with their number.
    :param vectorize_particles: True for `jax.vmap` over particles, False for `jax.lax.map`, or a callable of a
        function and an array of keys, as in NumPyro. Defaults to True.
    :raises ValueError: if ``alpha`` or ``num_particles`` is out of range.

    **References**

    1. Daudel et al. 2023, *Alpha-divergence Variational Inference Meets Importance Weighted Auto-Encoders*,
       arXiv 2210.06226
    """

    can_infer_discrete = True
    alpha: float

    def __init__(
        self,
        alpha: float = 0.0,
        num_particles: int = 16,
        vectorize_particles: bool | Callable = True,
    ):
        if not isinstance(alpha, Real) or not 0 <= alpha <= 1:
            raise ValueError(f"`alpha` is {alpha!r}, but must be a number in [0, 1]: 0 is the IWAE bound, 1 the ELBO.")
        try:
            operator.index(num_particles)
        except TypeError:
            raise ValueError(f"`num_particles` is {num_particles!r}, but must be an integer.") from None
        if num_particles < 2:
            raise ValueError(
                f"`num_particles` is {num_particles}, but must be at least 2: the bound and its gradient compare "
                "particles with each other. For one particle use numpyro.infer.TraceGraph_ELBO."
            )
        super().__init__(num_particles=num_particles, vectorize_particles=vectorize_particles)
        self.alpha = float(alpha)

    def score_signal(self, log_weights: LogWeights) -> PerParticle:
        """
        What multiplies the gradient of log q(z_j) at score-function sites: the estimator.

        :param log_weights: log-weights in nats, of shape ``(num_particles, *plates)``.
        :return: the signals, of the same shape. They may depend on the weights in any way for which
            bound - signal - normalized weight does not depend on the particle itself, else they are biased.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `score_signal(log_weights)`.")

    def loss(
        self,
        rng_key: Array,
        param_map: dict[str, Any],
        model: Callable,
        guide: Callable,
        *args,
        **kwargs,
    ) -> Float[Array, ""]:
        """
        Estimate the negative bound, with the estimator's gradient attached to it.

        :param jax.random.key rng_key: random number generator seed.
        :param dict param_map: current parameter values keyed by site name.
        :param model: Python callable with NumPyro primitives for the model.
        :param guide: Python callable with NumPyro primitives for the guide.
        :param args: arguments to the model / guide.
        :param kwargs: keyword arguments to the model / guide.
        :return: the loss in nats, to be minimized.
        :raises ValueError: if model and guide do not fit together; the message names the site or the plate.
        :raises NotImplementedError: for mutable sites.
        """
        # As in RenyiELBO: the subsample of a plate is the same for all particles.
        plate_key, rng_key = random.split(rng_key)
        seed_plates = partial(seed, rng_seed=plate_key, hide_types=["sample", "prng_key", "control_flow"])
        particle = partial(
            particle_densities, seed_plates(model), seed_plates(guide), args, kwargs, param_map, self._by_score
        )
        densities, plate_scale = self.vectorize_particles_fn(particle, random.split(rng_key, self.num_particles))
        plate_scale = plate_scale[0]

        log_weights = jax.lax.stop_gradient(densities.log_weight)
        bound = control_variates.vr_iwae_bound(log_weights, self.alpha)
        some_weight = ~jnp.all(jnp.isneginf(log_weights), axis=0)
        cotangents = jax.tree.map(
            lambda cotangent: jnp.where(some_weight, plate_scale * cotangent, 0), self._cotangents(log_weights)
        )
        return -_with_gradient(plate_scale * jnp.sum(bound), densities, cotangents)

    def loss_with_mutable_state(self, rng_key, param_map, model, guide, *args, **kwargs) -> dict:
        """:meth:`loss` in the form that SVI asks for where there is mutable state, which :meth:`loss` refuses."""
        return {"loss": self.loss(rng_key, param_map, model, guide, *args, **kwargs), "mutable_state": None}

    @staticmethod
    def _by_score(site: dict) -> bool:
        """Whether the sample of a guide site carries no gradient."""
        return is_score_function_site(site)

    def _cotangents(self, log_weights: LogWeights) -> Densities:
        """What multiplies the gradient of each particle's densities in the gradient of the bound."""
        shares = control_variates.normalized_weights(log_weights, self.alpha)
        return Densities(model=shares, guide_path=-shares, guide_score=self.score_signal(log_weights))


class VIMCOStar(ImportanceWeightedELBO):
    r"""
    VIMCO-⋆ [1], the estimator to begin with: its signal-to-noise ratio grows like :math:`\sqrt N` with the number
    of particles, where that of :class:`VIMCO` falls like :math:`1/\sqrt N`. With :math:`W_j` the normalized weight
    of particle j, score-function sites take the signal

    .. math:: s_j = -\frac{\log(1 - W_j) + \log(1 + \alpha/(N-1))}{1-\alpha} - W_j,

    the paper's at α = 0; the constant for 0 < α < 1 is derived in this project
    (:func:`~numpyro_vimco.control_variates.vimco_star_signal`). It is unbiased, and costs O(N).

    The parameters are those of :class:`ImportanceWeightedELBO`.

    Example::

        def model(x):
            z = numpyro.sample("z", dist.Bernoulli(0.3))
            numpyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)

        def guide(x):
            logits = numpyro.param("logits", 0.0)
            numpyro.sample("z", dist.Bernoulli(logits=logits))

        svi = SVI(model, guide, optax.adam(0.05), VIMCOStar(num_particles=16))
        result = svi.run(random.key(0), 1000, 1.4)

    **References**

    1. Daudel et al. 2026, arXiv 2602.01412
    """

    def score_signal(self, log_weights: LogWeights) -> PerParticle:
        return control_variates.vimco_star_signal(log_weights, self.alpha)


class VIMCO(ImportanceWeightedELBO):
    r"""
    VIMCO [1]: the bound of the other particles, with particle j's weight replaced by a mean of theirs. Kept for
    comparison: a term of order 1/N is left over in its signal, so that :class:`VIMCOStar` is better at any N.

    The parameters are those of :class:`ImportanceWeightedELBO`, and

    :param str baseline: ``"geometric"`` (default, the paper's choice) or ``"arithmetic"``: the mean that replaces
        particle j's weight.
    :raises ValueError: also for an unknown baseline.

    **References**

    1. *Variational Inference for Monte Carlo Objectives*, Andriy Mnih, Danilo J. Rezende, arXiv 1602.06725
    """

    _signals = {
        "geometric": control_variates.vimco_geometric_signal,
        "arithmetic": control_variates.vimco_arithmetic_signal,
    }

    def __init__(
        self,
        alpha: float = 0.0,
        num_particles: int = 16,
        vectorize_particles: bool | Callable = True,
        *,
        baseline: str = "geometric",
    ):
        if baseline not in self._signals:
            raise ValueError(f"`baseline` is {baseline!r}, but must be one of {', '.join(map(repr, self._signals))}.")
        super().__init__(alpha, num_particles, vectorize_particles)
        self.baseline = baseline

    def score_signal(self, log_weights: LogWeights) -> PerParticle:
        return self._signals[self.baseline](log_weights, self.alpha)


class REINFORCE(ImportanceWeightedELBO):
    r"""
    The score-function estimator without a baseline, :math:`s_j = \hat L - W_j` with :math:`\hat L` the estimate of
    the bound. Unbiased and very noisy: a yardstick.

    The parameters are those of :class:`ImportanceWeightedELBO`.
    """

    def score_signal(self, log_weights: LogWeights) -> PerParticle:
        return control_variates.reinforce_signal(log_weights, self.alpha)


class ReweightedWakeSleep(ImportanceWeightedELBO):
    r"""
    Reweighted wake-sleep [1, 2]: the model's parameters ascend the importance-weighted bound (wake-θ), the guide's
    descend the inclusive divergence KL(posterior || guide) with self-normalized weights (wake-φ),

    .. math:: \nabla_\theta = \sum_j W_j \nabla_\theta \log p(x, z_j), \qquad
              \nabla_\phi = \sum_j W_j \nabla_\phi \log q(z_j).

    No gradient flows through samples, whether or not their distribution has a reparameterised sampler. The loss is
    the negative bound at α = 0, of which the guide's update is *not* the gradient; it is biased at finite N and
    consistent as N grows.

    The parameters are those of :class:`ImportanceWeightedELBO` without ``alpha``.

    **References**

    1. *Reweighted Wake-Sleep*, Jörg Bornschein, Yoshua Bengio, arXiv 1406.2751
    2. *Revisiting Reweighted Wake-Sleep for Models with Stochastic Control Flow*, Tuan Anh Le et al.,
       arXiv 1805.10469
    """

    def __init__(self, num_particles: int = 16, vectorize_particles: bool | Callable = True):
        super().__init__(0.0, num_particles, vectorize_particles)

    def score_signal(self, log_weights: LogWeights) -> PerParticle:
        return control_variates.normalized_weights(log_weights, self.alpha)

    @staticmethod
    def _by_score(site: dict) -> bool:
        return is_latent_site(site)

    def _cotangents(self, log_weights: LogWeights) -> Densities:
        shares = self.score_signal(log_weights)
        return Densities(model=shares, guide_path=shares, guide_score=shares)


@jax.custom_jvp
def _with_gradient(value: Array, densities: Densities, cotangents: Densities) -> Array:
    """``value``, with derivative Σ cotangents · d densities.

    The cotangents are handed to the densities' derivative and never multiplied with the densities themselves, so
    that a particle of weight zero (0 · -inf) is harmless. A JVP serves reverse and forward mode.
    """
    return value


@_with_gradient.defjvp
def _with_gradient_jvp(primals, tangents):
    value, _, cotangents = primals
    _, densities_dot, _ = tangents
    products = jax.tree.map(lambda cotangent, dot: jnp.sum(cotangent * dot), cotangents, densities_dot)
    return value, sum(jax.tree.leaves(products)).astype(value.dtype)
