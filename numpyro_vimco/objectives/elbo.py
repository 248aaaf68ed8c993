# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Importance-weighted objectives for :class:`numpyro.infer.SVI`."""

from collections.abc import Callable, Collection, Mapping
from copy import copy
from functools import partial
from numbers import Real
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import Sharding
from jaxtyping import Array, Float
from numpyro.infer.elbo import ELBO

from numpyro_vimco.arguments import check_key
from numpyro_vimco.checks.supports_and_plates import check_chunk_size, check_particles, check_sharding, delta_error
from numpyro_vimco.compilation import untraced
from numpyro_vimco.densities.chains import find_chains, marked
from numpyro_vimco.densities.densities import Densities
from numpyro_vimco.densities.program import Program
from numpyro_vimco.objectives import control_variates, gradients
from numpyro_vimco.objectives.control_variates import LogWeights, PerParticle
from numpyro_vimco.objectives.elements import value_checks
from numpyro_vimco.objectives.gradients import Weights
from numpyro_vimco.objectives.jumping import jumping_sites
from numpyro_vimco.randomness import ArrayParams, SeedPlates, split
from numpyro_vimco.sites import is_latent_site, is_score_function_site


class ImportanceWeightedELBO(ELBO):
    r"""
    Base class of the objectives of this package: the VR-IWAE bound [1],

    .. math::

        L = \frac{1}{1-\alpha} E_{z_1, \ldots, z_N \sim q} \left[
            \log \frac1N \sum_{j=1}^N \left( \frac{p(x, z_j)}{q(z_j)} \right)^{1-\alpha} \right],

    with gradients through the samples of guide sites that have a reparameterised sampler, and score-function
    gradients for those that have none (discrete sites, mixtures, von Mises, Wishart, …). ``loss`` is the
    negative of the estimate in nats, as in :class:`numpyro.infer.RenyiELBO`.

    A subclass is an estimator. It defines :meth:`score_signal`, a pure function of the log-weights::

        class MyEstimator(ImportanceWeightedELBO):
            def score_signal(self, log_weights):
                return control_variates.vimco_star_signal(log_weights, self.alpha)

    **Plates.** If plates are common to all sample sites of model and guide, each of their elements has a bound
    of its own, with its own weights, and the objective is their sum; if they are subsampled, it is scaled.
    Other plates are summed into one weight, and can be subsampled only where α = 1. Elements of a plate must then be
    independent, as a plate says. Where the data are not traced, this is checked when a fit begins (and at its end by
    diagnostics); plates whose elements depend on each other belong into ``joint_plates``.

    **Sums.** Finite latents of the model that are marked ``infer={"enumerate": "parallel"}``, and that the guide does
    not sample, are summed out inside of each particle's weight: :math:`p(x, z) = \sum_e p(x, z, e)`. NumPyro's
    enumeration and the package funsor, which has to be installed, do so exactly, in plates and along chains (`scan`
    with history, or a loop over `markov`). A scale multiplies the logarithm of the sum, and must be one number for all
    sites that summed ones connect.

    **Scale and mask.** `handlers.scale` multiplies a site's log-density in the weight; the gradient is that of
    this scaled objective, with the score of the density that the sample was drawn from. `handlers.mask`
    takes elements of a site out of the program: they have neither a density nor a score, and
    nothing that is not masked should depend on them. Where the model masks a latent, as ``obs_mask`` does, its
    density in the guide does not count either, in automatic guides and in those written by hand. A guide that draws
    latents jointly (`AutoMultivariateNormal`) has no density of single elements: there, masked ones count with the
    density that the model would give them, which integrates to one.

    **Zero weights.** Where all particles of an element have weight zero, the loss is ``inf`` and the gradient 0.
    Where some have, they take no part in the gradient, even if the derivative of a density is infinite there (a
    Poisson count at rate 0). Computations of the model before its distributions are not protected: ``jnp.log(z)`` at
    z = 0 makes the gradient NaN, and ``jnp.where(z > 0, z, 1)`` inside of the logarithm is the cure. NaN
    log-weights give a NaN loss. A second derivative raises an error.

    :param float alpha: order α of the bound, in [0, 1]: 0 is the importance-weighted bound (IWAE), tightest for
        a given number of particles; 1 is the ELBO. Defaults to 0.
    :param int num_particles: number N of particles, at least 2. Defaults to 16: the estimators use the other
        particles as a baseline, and the bound tightens with their number.
    :param vectorize_particles: True for `jax.vmap` over particles, False for `jax.lax.map`, or a callable of a
        function and an array of keys, as in NumPyro; with doubly reparameterised gradients also of a function and a
        pytree of arrays with a leading axis for the particles. Defaults to True.
    :param bool doubly_reparameterized: how gradients flow through path sites. True (default) is the doubly
        reparameterised form [2], whose signal-to-noise ratio grows with N where the plain pathwise gradient's falls.
        It traces the guide three times more, and once more each for Delta sites or factors and for
        `plate_particles`. It evaluates the guide's density at given values, for which a flow needs its inverse.
        Delta sites, masked ones, and distributions whose support may depend on parameters (bounds that are arrays,
        transforms of a base that is not on the real line) keep plain gradients. False is the plain gradient for all,
        in one pass of guide and model: for flows whose inverse is slow or missing (`AutoBNAFNormal`), and for
        `forward_mode_differentiation` of a model with a `while_loop`. Without path sites both are the same.
    :param score_sites: names of latents that use the score function although their distribution has a reparameterised
        sampler, because the density jumps where they pass a threshold, are rounded, or become an index. A pathwise
        gradient does not see a jump, and is biased. Defaults to None: such latents are looked for before the first
        step, where the data are not traced, and a warning names those that are found (``docs/which_objective.md`` says
        how, and what may be missed). A set, which may be empty, is taken as it is, without a search.
    :param joint_plates: names of plates whose elements share one weight, although the plates are common to all sites:
        for elements that are not independent (a random walk along the plate). Defaults to none. Other elements that
        depend on each other are an error that names the plate, where values are concrete.
    :param int chunk_size: number of particles to evaluate at a time, a divisor of `num_particles`. Defaults to None,
        all of them. Memory is then that of ``chunk_size`` particles, beside the keys and the log-weights of all, for
        one more forward pass; results are the same but for the rounding of sums. A callable
        `vectorize_particles` is given ``chunk_size`` particles.
    :param jax.sharding.Sharding particle_sharding: how an axis of particles, or of the particles of a chunk, is spread
        over devices, of this process or of several; on a mesh whose axes are of type Auto. Defaults to None: the
        compiler decides, by how the arrays of the model are spread.
    :raises ValueError: if ``alpha`` or ``num_particles`` is out of range, ``chunk_size`` does not divide
        ``num_particles``, or ``particle_sharding`` does not divide the particles that are evaluated at a time.

    Example, of an estimator by its signals, with model and guide of :class:`VIMCOStar`::

        class LeaveOneOut(ImportanceWeightedELBO):
            def score_signal(self, log_weights):
                return control_variates.vimco_arithmetic_signal(log_weights, self.alpha)

        svi = SVI(model, guide, optax.adam(0.05), LeaveOneOut(num_particles=16))
        result = svi.run(random.key(0), 1000, 1.4)

    **References**

    1. Daudel et al. 2023, *Alpha-divergence Variational Inference Meets Importance Weighted Auto-Encoders*,
       arXiv 2210.06226
    2. Tucker et al. 2019, *Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives*, arXiv 1810.04152
    """

    can_infer_discrete = True
    alpha: float
    doubly_reparameterized: bool
    joint_plates: frozenset[str]
    score_sites: frozenset[str] | None
    chunk_size: int | None
    particle_sharding: Sharding | None
    plate_particles: Mapping[str, int] = MappingProxyType({})
    chain_particles: Mapping[str, int] = MappingProxyType({})

    checks_values = True

    def __init__(
        self,
        alpha: float = 0.0,
        num_particles: int = 16,
        vectorize_particles: bool | Callable = True,
        *,
        doubly_reparameterized: bool = True,
        score_sites: Collection[str] | None = None,
        joint_plates: Collection[str] = (),
        chunk_size: int | None = None,
        particle_sharding: Sharding | None = None,
    ):
        if not isinstance(alpha, Real) or not 0 <= alpha <= 1:
            raise ValueError(f"`alpha` is {alpha!r}, but must be a number in [0, 1]: 0 is the IWAE bound, 1 the ELBO.")
        num_particles = check_particles("num_particles", num_particles)
        if chunk_size is not None:
            chunk_size = check_chunk_size(chunk_size, num_particles)
        if particle_sharding is not None:
            check_sharding(particle_sharding, num_particles, chunk_size)
        super().__init__(num_particles=num_particles, vectorize_particles=vectorize_particles)
        self.alpha = float(alpha)
        self.doubly_reparameterized = doubly_reparameterized
        names = [score_sites] if isinstance(score_sites, str) else score_sites
        self.score_sites = None if names is None else frozenset(names)
        self.joint_plates = frozenset([joint_plates] if isinstance(joint_plates, str) else joint_plates)
        self.chunk_size = chunk_size
        self.particle_sharding = particle_sharding

    def score_signal(self, log_weights: LogWeights) -> PerParticle:
        """
        The signals: what multiplies the gradient of log q(z_j) at score-function sites. This is the estimator.

        :param log_weights: log-weights in nats, of shape ``(num_particles, *plates)``.
        :return: the signals, of the same shape. The gradient is unbiased if bound - signal - normalized weight of a
            particle depends on the other particles only.
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
        check_key(rng_key)
        if self.score_sites is None:
            found = self.with_score_sites(param_map, model, guide, *args, **kwargs)
            return found.loss(rng_key, param_map, model, guide, *args, **kwargs)
        plate_key, rng_key = split(rng_key)
        program = self.program(model, guide, args, kwargs, plate_key)
        kinds = program.kinds(param_map, rng_key)
        if self.checks_values and not _has_tracers((args, kwargs)):
            # In a fit parameters are traced: the check is then at those that the program itself begins with.
            with untraced():
                with_values = self.program(model, guide, args, kwargs, jax.random.key(0))
                value_checks(with_values, kinds)({} if _has_tracers(param_map) else param_map)
        self.check_program(program, param_map, rng_key)
        keys = split(rng_key, self.num_particles)
        weigh = partial(gradients.weigh, alpha=self.alpha, score_signal=self.score_signal)
        evaluate = partial(gradients.one_pass, program, self.vectorize_particles_fn, self._cotangents)
        if self.doubly_reparameterized and kinds.path_sites:
            evaluate = partial(gradients.doubly_reparameterized, program, self.vectorize_particles_fn, kinds.masks)
        return -gradients.estimate(evaluate, param_map, keys, weigh, self.chunk_size, self._shard)

    def loss_with_mutable_state(self, rng_key, param_map, model, guide, *args, **kwargs) -> dict:
        """:meth:`loss` in the form that SVI asks for where there is mutable state, which :meth:`loss` refuses."""
        return {"loss": self.loss(rng_key, param_map, model, guide, *args, **kwargs), "mutable_state": None}

    def without_value_checks(self) -> "ImportanceWeightedELBO":
        """A copy whose :meth:`loss` does not look at values; :meth:`check` did."""
        other = copy(self)
        other.checks_values = False
        return other

    def with_score_sites(
        self, param_map: dict[str, Any], model: Callable, guide: Callable, *args, **kwargs
    ) -> "ImportanceWeightedELBO":
        """
        A copy with the ``score_sites`` at which the density is seen to jump, if they are not given. A warning names
        them. The parameters are those of :meth:`loss`, without a key.
        """
        if self.score_sites is not None:
            return self
        other = copy(self)
        other.score_sites = frozenset()
        params = {} if _has_tracers(param_map) else param_map
        make_program = lambda: other.program(model, guide, args, kwargs, jax.random.key(0))  # noqa: E731
        found = jumping_sites(make_program, params, _has_tracers((args, kwargs)))
        other.score_sites = frozenset(found)
        return other

    def check(self, param_map: dict[str, Any], model: Callable, guide: Callable, *args, **kwargs) -> None:
        """
        Raise for a model and a guide that this objective cannot fit, as the first :meth:`loss` does where no value is
        traced by JAX. The parameters are those of :meth:`loss`, without a key.
        """
        program = self.program(model, guide, args, kwargs, jax.random.key(0))
        value_checks(program, program.kinds(param_map, jax.random.key(0)))(param_map)
        self.check_program(program, param_map, jax.random.key(0))

    def program(self, model: Callable, guide: Callable, args: tuple, kwargs: dict, plate_key: Array) -> Program:
        """
        Model and guide with their arguments, as this objective evaluates them.

        :param jax.random.key plate_key: key of subsampled plates; their subsample is the same for all particles.
        """
        met: list[str] = []
        chains = find_chains(model, guide, args, kwargs, self.chain_particles)
        model, guide = (marked(ArrayParams(SeedPlates(fn, plate_key, met)), chains) for fn in (model, guide))
        return Program(
            model=model,
            guide=guide,
            args=args,
            kwargs=kwargs,
            by_score=self._by_score,
            plate_particles=self.plate_particles,
            joint_plates=self.joint_plates,
            linear=self.alpha == 1,
            chains=chains,
            score_sites=self.score_sites or frozenset(),
        )

    def check_program(self, program: Program, params: dict[str, Any], rng_key: Array) -> None:
        """Raise for programs that this estimator cannot fit; a subclass may have such."""

    def _shard(self, keys: Array) -> Array:
        """Spread keys of particles over devices; the compiler then spreads all that is computed from them."""
        if self.particle_sharding is None:
            return keys
        return jax.lax.with_sharding_constraint(keys, self.particle_sharding)

    @staticmethod
    def _by_score(site: dict) -> bool:
        """Whether the sample of a guide site carries no gradient."""
        return is_score_function_site(site)

    def _cotangents(self, weights: Weights) -> Densities:
        """What multiplies the gradient of each density of a level in the gradient of the bound."""
        return Densities(model=weights.share, guide_rest=-weights.share, guide_score=weights.signal)


def _numbers(argument: str, numbers: Any, what: str, example: str) -> dict[str, int]:
    """Numbers of particles by name."""
    if not isinstance(numbers, Mapping | None):
        raise ValueError(
            f"`{argument}` is {numbers!r}, but must be a dict from the name of a {what} to a number of particles: "
            f"`{argument}={{'{example}': 8}}`."
        )
    return {name: check_particles(f"{argument}['{name}']", number) for name, number in (numbers or {}).items()}


def _has_tracers(tree: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


class VIMCOStar(ImportanceWeightedELBO):
    r"""
    VIMCO-⋆ [1], the estimator to begin with: its signal-to-noise ratio grows like :math:`\sqrt N` with the number
    of particles, where that of :class:`VIMCO` falls like :math:`1/\sqrt N` (at α = 0, with N large against the spread
    of the weights). With :math:`W_j` the normalized weight
    of particle j, score-function sites take the signal

    .. math:: s_j = -\frac{\log(1 - W_j) + \log(1 + \alpha/(N-1))}{1-\alpha} - W_j,

    the paper's at α = 0; the constant for 0 < α < 1 is derived in this project
    (:func:`~numpyro_vimco.objectives.control_variates.vimco_star_signal`). It is unbiased, and costs O(N).

    The parameters are those of :class:`ImportanceWeightedELBO`, and

    :param dict plate_particles: number M of local particles by plate: ``{"data": 8}``. For each particle of the sites
        outside of the plate, each element of the plate has M draws of the sites inside of it. With latents in a plate
        beside global ones, the joint weight is a product over the plate's elements, and one particle takes all of it;
        with local particles each element averages its own. Plates inside of a named one belong to it. Densities
        inside of the plate are then evaluated ``num_particles`` times M times, those outside of it no more often. The
        plate may be subsampled where α = 1. Defaults to none; derived in this project
        (:func:`~numpyro_vimco.objectives.control_variates.local_vimco_star_signal`).
    :param dict chain_particles: number K of samples at each step of a chain, by the name of a latent that a `scan`
        draws: ``{"count": 16}``. All latents of one step are drawn together. For each particle of the other sites, all
        :math:`K^T` paths through the samples of T steps count, by a recursion whose cost is :math:`T K^2` [2]. The
        guide must draw its steps independently given the other sites, as ``AutoMixed(model, chains={"count"})`` does.
        Without this argument a whole path is one particle, whose weight is a product over all steps. Defaults to none;
        signals derived in this project (``docs/mathematics.md``, "Chains").
    :raises ValueError: also for fewer than two local particles, and at the first step for a plate that does not
        exist, has no latents, is nested in another named one, or whose latents a site outside of it depends on.

    Example::

        def model(x):
            z = numpyro.sample("z", dist.Bernoulli(0.3))
            numpyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)

        def guide(x):
            logits = numpyro.param("logits", 0.1)
            numpyro.sample("z", dist.Bernoulli(logits=logits))

        svi = SVI(model, guide, optax.adam(0.05), VIMCOStar(num_particles=16))
        result = svi.run(random.key(0), 1000, 1.4)

    **References**

    1. Daudel et al. 2026, arXiv 2602.01412
    2. Aitchison 2019, *Tensor Monte Carlo*, arXiv 1806.08593
    """

    def __init__(
        self,
        alpha: float = 0.0,
        num_particles: int = 16,
        vectorize_particles: bool | Callable = True,
        *,
        doubly_reparameterized: bool = True,
        score_sites: Collection[str] | None = None,
        joint_plates: Collection[str] = (),
        plate_particles: Mapping[str, int] | None = None,
        chain_particles: Mapping[str, int] | None = None,
        chunk_size: int | None = None,
        particle_sharding: Sharding | None = None,
    ):
        super().__init__(
            alpha,
            num_particles,
            vectorize_particles,
            doubly_reparameterized=doubly_reparameterized,
            score_sites=score_sites,
            joint_plates=joint_plates,
            chunk_size=chunk_size,
            particle_sharding=particle_sharding,
        )
        self.plate_particles = _numbers("plate_particles", plate_particles, "plate", "data")
        self.chain_particles = _numbers("chain_particles", chain_particles, "latent inside of `scan`", "count")

    def score_signal(self, log_weights: LogWeights) -> PerParticle:
        return control_variates.vimco_star_signal(log_weights, self.alpha)


class VIMCO(ImportanceWeightedELBO):
    r"""
    VIMCO [1]: the bound of the other particles, with particle j's weight replaced by a mean of theirs. Kept for
    comparison: a term of order 1/N is left over in its signal, so that at α = 0 its signal-to-noise ratio falls like
    :math:`1/\sqrt N`.

    The parameters are those of :class:`ImportanceWeightedELBO`, and

    :param str baseline: ``"geometric"`` (default, the paper's choice) or ``"arithmetic"``: the mean that replaces
        particle j's weight.
    :raises ValueError: also for an unknown baseline.

    Example, with model and guide of :class:`VIMCOStar`::

        svi = SVI(model, guide, optax.adam(0.05), VIMCO(num_particles=16, baseline="arithmetic"))
        result = svi.run(random.key(0), 1000, 1.4)

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
        doubly_reparameterized: bool = True,
        score_sites: Collection[str] | None = None,
        joint_plates: Collection[str] = (),
        chunk_size: int | None = None,
        particle_sharding: Sharding | None = None,
    ):
        if baseline not in self._signals:
            raise ValueError(f"`baseline` is {baseline!r}, but must be one of {', '.join(map(repr, self._signals))}.")
        super().__init__(
            alpha,
            num_particles,
            vectorize_particles,
            doubly_reparameterized=doubly_reparameterized,
            score_sites=score_sites,
            joint_plates=joint_plates,
            chunk_size=chunk_size,
            particle_sharding=particle_sharding,
        )
        self.baseline = baseline

    def score_signal(self, log_weights: LogWeights) -> PerParticle:
        return self._signals[self.baseline](log_weights, self.alpha)


class REINFORCE(ImportanceWeightedELBO):
    r"""
    The score-function estimator without a baseline, :math:`s_j = \hat L - W_j` with :math:`\hat L` the estimate of
    the bound. Unbiased and very noisy: a yardstick.

    The parameters are those of :class:`ImportanceWeightedELBO`.

    Example, with model and guide of :class:`VIMCOStar`::

        svi = SVI(model, guide, optax.adam(0.01), REINFORCE(num_particles=16))
        result = svi.run(random.key(0), 1000, 1.4)
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

    The parameters are those of :class:`ImportanceWeightedELBO` without ``alpha``, ``doubly_reparameterized`` and
    ``score_sites``.

    Example, with model and guide of :class:`VIMCOStar`::

        svi = SVI(model, guide, optax.adam(0.05), ReweightedWakeSleep(num_particles=16))
        result = svi.run(random.key(0), 1000, 1.4)

    **References**

    1. *Reweighted Wake-Sleep*, Jörg Bornschein, Yoshua Bengio, arXiv 1406.2751
    2. *Revisiting Reweighted Wake-Sleep for Models with Stochastic Control Flow*, Tuan Anh Le et al.,
       arXiv 1805.10469
    """

    def __init__(
        self,
        num_particles: int = 16,
        vectorize_particles: bool | Callable = True,
        *,
        joint_plates: Collection[str] = (),
        chunk_size: int | None = None,
        particle_sharding: Sharding | None = None,
    ):
        super().__init__(
            0.0,
            num_particles,
            vectorize_particles,
            doubly_reparameterized=False,
            score_sites=(),
            joint_plates=joint_plates,
            chunk_size=chunk_size,
            particle_sharding=particle_sharding,
        )

    def score_signal(self, log_weights: LogWeights) -> PerParticle:
        return control_variates.normalized_weights(log_weights, self.alpha)

    @staticmethod
    def _by_score(site: dict) -> bool:
        return is_latent_site(site)

    def check_program(self, program: Program, params: dict[str, Any], rng_key: Array) -> None:
        for name in program.deltas_at_parameters(params, rng_key):
            raise delta_error(name)

    def _cotangents(self, weights: Weights) -> Densities:
        return Densities(model=weights.share, guide_rest=weights.share, guide_score=weights.share)
