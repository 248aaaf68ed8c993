# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""A kernel of NumPyro that a fit guides."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from numpyro.distributions import biject_to
from numpyro.infer.mcmc import MCMCKernel

from numpyro_vimco.arguments import check_integer
from numpyro_vimco.compilation import untraced
from numpyro_vimco.densities.levels import Levels
from numpyro_vimco.draws.pooling import Mixture, by_start, in_pool, mixture_of, pooled, propose_pooled
from numpyro_vimco.draws.proposals import structure_of, take
from numpyro_vimco.export.posterior_draws import weighed
from numpyro_vimco.mcmc.inner import default_kernel, placed, sites_of_hmc, still_supports, unconstrained
from numpyro_vimco.randomness import split

# Proposals of a whole run are made before it up to so many numbers: 256 MiB in single precision.
MOST = 2**26
# Proposals of a global step: where all latents are drawn together, and where some have particles of their own
# (`benchmarks/plans.py --proposals`).
OF_SHARED, OF_LOCAL = 40, 4

Values = dict[str, Array]


class GuidedState(NamedTuple):
    """The state of :class:`GuidedMCMC`.

    :ivar z: the latents, as the inner kernel holds them.
    :ivar inner_state: its state.
    :ivar rng_key: for the next step.
    :ivar moved: whether the last global step moved, in [0, 1]: the share of elements where these have weights of their
        own.
    :ivar step: number of steps that were taken.
    :ivar made: latents and log-weights of proposals that were made before, of shape ``(steps, proposals, ...)``, each
        for one step; None where they are made in the step. After the last of these, no global step moves.
    """

    z: Values
    inner_state: Any
    rng_key: Array
    moved: Array
    step: Array
    made: tuple[Values, Array] | None

    @property
    def diverging(self) -> Array:
        """Whether the last step of an inner HMC diverged."""
        return self.inner_state.diverging


class GuidedMCMC(MCMCKernel):
    r"""
    MCMC that a fit guides. A step is one of another kernel, and a *global step*, whose proposals come from the fit.

    Importance weights fail where the guide cannot follow the posterior. MCMC fails where its steps cannot cross between
    modes. Here each does what the other cannot.

    Example, with the posterior of :func:`~numpyro_vimco.fit`::

        kernel = GuidedMCMC(posterior)
        mcmc = MCMC(kernel, num_warmup=500, num_samples=1000, num_chains=4, chain_method="vectorized")
        mcmc.run(random.key(1), x)

    :meth:`.Posterior.refine` does this in one line, with chains that begin at draws of each start.

    **The global step** draws n proposals from the defended guides of all starts, whose mixture has the density q. It
    takes one of these or the present state, in proportion to w = p(x, z) / q(z): iterated sampling importance
    resampling [1, 2]. It leaves the posterior invariant, whatever the guides are.

    Where plates are common to all sites, each of their elements takes one by itself. All proposals of a step then come
    from one guide, or from one component of its defence, which is chosen at random: so what elements take is
    independent. Where a plate or a chain has particles of its own, the present local values are one of the M particles,
    or one of the K samples of each step: conditional importance sampling [3], here with several guides (derived in
    ``docs/mathematics.md``).

    :param Posterior posterior: of :func:`fit`, whose starts have one posterior: no parameters of the model beside
        several starts.
    :param MCMCKernel inner_kernel: any kernel of the same model that implements ``refresh`` (NumPyro 0.22 or later):
        `NUTS`, `HMC`, `DiscreteHMCGibbs`, `DiscreteGibbs`, `Gibbs`. Defaults to None: `NUTS` for continuous latents and
        `DiscreteGibbs` for those of finitely many values 0, 1, …; other latents, and discrete ones of plates and chains
        with particles of their own, then move in global steps only. Sites that are summed out stay so.
    :param int num_proposals: number n of proposals of a global step. Defaults to None: 40, or 4 where a plate or a
        chain has particles of its own, as each proposal draws and weighs all of these anew.
    :raises ValueError: for a posterior without latents or of a subsampled plate, starts with different parameters of
        the model, guides with a Delta site, an inner kernel from a potential function or of other latents.
    :raises NotImplementedError: for NumPyro before 0.22, and an inner kernel without ``refresh``.

    **References**

    1. *Using All Metropolis-Hastings Proposals to Estimate Mean Values*, Tjelmeland 2004
    2. *Local-Global MCMC kernels: the best of both worlds*, Samsonov, Lagutin, Gabrié, Durmus, Naumov and Moulines,
       arXiv 2111.02702
    3. *Particle Markov chain Monte Carlo methods*, Andrieu, Doucet and Holenstein 2010, for paths
    """

    sample_field = "z"

    def __init__(self, posterior: Any, inner_kernel: MCMCKernel | None = None, num_proposals: int | None = None):
        if not hasattr(MCMCKernel, "refresh"):
            raise NotImplementedError(
                "`GuidedMCMC` needs kernels with `refresh`, which NumPyro has from 0.22 on: `pip install -U numpyro`."
            )
        approx = posterior._approx
        if num_proposals is None:
            num_proposals = OF_LOCAL if approx.local else OF_SHARED
        self.num_proposals = check_integer("num_proposals", num_proposals, 1, "chains take one of them, or stay")
        approx.check_has_posterior()
        if approx.params_of_model and approx.num_starts > 1:
            raise ValueError(
                f"The model has parameters ('{min(approx.params_of_model)}'), so that each of the "
                f"{approx.num_starts} starts has a posterior of its own. Take one of them: "
                "`Posterior(svi, posterior.params, ...)` with the model's arguments; or give the parameter a prior."
            )
        self._approx = in_pool(approx)
        self._mixture = mixture_of(self._approx)
        self._structure = structure_of(self._approx, self._approx.local)
        self._latents, self._supports = self._approx.latents(), still_supports(self._approx)
        for name in self._latents:
            if name not in self._mixture.latents:
                raise ValueError(
                    f"Site '{name}' of the guide is a Delta, or has no density, so that no weight says how probable "
                    "its other values are. Give it a distribution."
                )
        self.inner_kernel = default_kernel(self._approx) if inner_kernel is None else _checked(inner_kernel)
        self._is_vectorized = False
        self._made: tuple[Values, Array] | None = None

    @property
    def model(self) -> Any:
        """The model of the inner kernel."""
        return self.inner_kernel.model

    @property
    def default_fields(self) -> tuple[str, ...]:
        """What `MCMC` collects: ``moved``, and ``diverging`` where the inner kernel is HMC."""
        return ("z", "moved", *(f for f in self.inner_kernel.default_fields if f == "diverging"))

    def get_diagnostics_str(self, state: GuidedState) -> str:
        return self.inner_kernel.get_diagnostics_str(state.inner_state)

    def postprocess_fn(self, model_args: tuple, model_kwargs: dict | None) -> Any:
        return self.inner_kernel.postprocess_fn(*self._arguments(model_args, model_kwargs))

    def init(
        self, rng_key: Array, num_warmup: int, init_params: Values | None, model_args: tuple, model_kwargs: dict | None
    ) -> GuidedState:
        """Begin at ``init_params``, as the inner kernel takes them, or at one of ``num_proposals`` weighted draws."""
        args, kwargs = self._arguments(model_args, model_kwargs)
        self._is_vectorized = jnp.ndim(rng_key) > (0 if jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key) else 1)
        begin: Any = partial(self._begin, num_warmup=num_warmup, args=args, kwargs=kwargs)
        # One program; by itself, each operation of `init` is one.
        over_chains: Any = jax.vmap if self._is_vectorized else lambda fn: fn
        state = jax.jit(over_chains(begin))(rng_key, init_params)
        constrain = lambda z: self.inner_kernel.get_constrain_fn(args, kwargs)(z)  # noqa: E731
        self._with_inner(lambda: over_chains(constrain)(state.z), args, kwargs)
        made, self._made = self._made, None
        return state._replace(made=made)

    def sample(self, state: GuidedState, model_args: tuple, model_kwargs: dict | None) -> GuidedState:
        args, kwargs = self._arguments(model_args, model_kwargs)
        step = partial(self._step, args=args, kwargs=kwargs)
        return jax.vmap(step)(state) if self._is_vectorized else step(state)

    def as_inner(self, values: Values) -> Values:
        """Values of the latents as the inner kernel holds them, for ``init_params`` of ``MCMC.run``."""
        sites = {name: self._latents[name] for name in sites_of_hmc(self.inner_kernel, self._latents)}
        approx = self._approx
        return {**values, **unconstrained(self.inner_kernel, sites, values, approx.args, approx.kwargs)}

    def prepare(self, rng_key: Array, num_chains: int, num_steps: int) -> Values:
        """
        Where chains begin, and proposals for all of their steps, by the program that draws from the pool after a fit.

        Chains begin at a weighted draw of each start in turn, so that R-hat shows whether they leave what their start
        found. Proposals are made before the run where they take less than :data:`MOST` numbers, and plates are not
        common to all sites; else in the steps, whose program then takes longer to compile.

        :return: ``init_params`` of the next ``MCMC.run``, with a leading axis for chains if there are several.
        """
        approx, (start_key, proposal_key) = self._approx, split(rng_key)
        # Of a single guide without defence, the sampler of the pool draws no local particles from the model.
        is_of_mixture = pooled(approx).starts is not None
        number = num_chains * num_steps * self.num_proposals
        if is_of_mixture and not self._structure.dims and number * approx.size <= MOST:
            made = propose_pooled(approx, proposal_key, number)
            shape = (num_chains,) * (num_chains > 1) + (num_steps, self.num_proposals)
            both = {name: made.values[name] for name in self._latents}, made.log_weight
            self._made = jax.tree.map(lambda x: jnp.asarray(x.reshape(shape + x.shape[1:])), both)
        first = jax.jit(jax.vmap(self.as_inner))(self._first_values(start_key, num_chains))
        return first if num_chains > 1 else jax.tree.map(lambda x: x[0], first)

    def _first_values(self, rng_key: Array, num_chains: int) -> dict[str, np.ndarray]:
        """A weighted draw of each start in turn, for so many chains."""
        approx = self._approx
        draw_key, pool_key, *keys = split(rng_key, 2 + approx.num_starts)
        draws = by_start(approx).all(approx.starts, draw_key, 1000, None)
        by_guide = [jax.tree.map(lambda x, i=i: x[:, i], draws) for i in range(approx.num_starts)]
        # A guide may propose nothing that the posterior holds; so may all, each of another element.
        by_guide = [one for one in by_guide if not np.isneginf(one.log_weight).all(0).any()]
        by_guide = by_guide or [propose_pooled(approx, pool_key, 4000)]
        of_each = -(-num_chains // len(by_guide))
        of_guides = [weighed(one, approx, False, key, of_each)[0] for one, key in zip(by_guide, keys)]
        places = [divmod(chain, len(of_guides)) for chain in range(num_chains)]
        return {name: np.stack([of_guides[i][name][j] for j, i in places]) for name in self._latents}

    def _begin(
        self, rng_key: Array, init_params: Values | None, num_warmup: int, args: tuple, kwargs: dict
    ) -> GuidedState:
        key, draw_key, inner_key = split(rng_key, 3)
        if init_params is None:
            init_params = self.as_inner(self._taken(*self._proposals(self._mixture, None, draw_key), draw_key)[0])
        inner = self.inner_kernel.init(inner_key, num_warmup, init_params, args, kwargs)
        z = getattr(inner, self.inner_kernel.sample_field)
        if missing := self._latents.keys() ^ z.keys():
            raise ValueError(
                f"The inner kernel draws {', '.join(map(repr, z))}, but the latents of the guide are "
                f"{', '.join(map(repr, self._latents))}: '{min(missing)}' is not in both. Sites that are summed out "
                "must be so in both, by `infer={'enumerate': 'parallel'}`."
            )
        return GuidedState(z, inner, key, jnp.zeros(()), jnp.zeros((), int), None)

    def _step(self, state: GuidedState, args: tuple, kwargs: dict) -> GuidedState:
        kernel = self.inner_kernel
        key, step_key = split(state.rng_key)
        inner = self._with_inner(lambda: kernel.sample(state.inner_state, args, kwargs), args, kwargs)
        constrained = kernel.get_constrain_fn(args, kwargs)(getattr(inner, kernel.sample_field))
        old = {name: constrained[name] for name in self._latents}
        made = None
        if state.made is not None:
            values, log_weight = jax.tree.map(lambda x: x[state.step], state.made)
            made = values, jnp.where(state.step < len(state.made[1]), log_weight, -jnp.inf)
        new, moved = self._global_step(old, step_key, made)
        inner = placed(kernel, inner, old, new, self._latents, args, kwargs)
        return GuidedState(getattr(inner, kernel.sample_field), inner, key, moved, state.step + 1, state.made)

    def _with_inner(self, fn: Callable, args: tuple, kwargs: dict) -> Any:
        """What a function of the inner kernel returns: again after its `init`, where that kept what JAX traced."""
        try:
            return fn()
        except jax.errors.UnexpectedTracerError:  # bounds of a support, say
            with untraced():
                self.inner_kernel.init(jax.random.key(0), 0, None, args, kwargs)
            return fn()

    def _global_step(
        self, present: Values, rng_key: Array, made: tuple[Values, Array] | None = None
    ) -> tuple[Values, Array]:
        """What is taken of the present latents and of proposals, and the share of elements that moved."""
        mixture_key, present_key, draw_key, choice_key = split(rng_key, 4)
        mixture = self._mixture.of_one(mixture_key) if self._structure.dims else self._mixture
        here = mixture.beside(self._approx.starts, present, present_key)
        if made is None:
            values, log_weight = self._proposals(mixture, here, draw_key)
        else:
            of_here = mixture.weigh(self._approx.starts, here, draw_key)
            one = {name: of_here.values[name] for name in present}, of_here.log_weight
            values, log_weight = jax.tree.map(lambda x, many: jnp.concatenate([x[None], many]), one, made)
        new, index = self._taken(values, log_weight, choice_key)
        return {name: value.astype(present[name].dtype) for name, value in new.items()}, jnp.mean(index > 0)

    def _proposals(self, mixture: Mixture, here: Levels[Values] | None, rng_key: Array) -> tuple[Values, Array]:
        """Latents and log-weights of what there is, and of proposals."""
        draw_key, weigh_key = split(rng_key)
        starts = self._approx.starts
        values = self._map(partial(mixture.draw_any, starts), split(draw_key, self.num_proposals))
        if here is not None:
            values = jax.tree.map(lambda one, many: jnp.concatenate([one[None], many]), here, values)
        keys = split(weigh_key, len(jax.tree.leaves(values)[0]))
        draws = self._map(lambda both: mixture.weigh(starts, *both), (values, keys))
        return {name: draws.values[name] for name in self._latents}, draws.log_weight

    def _taken(self, values: Values, log_weight: Array, rng_key: Array) -> tuple[Values, Array]:
        """One of some values in proportion to their weights, of each element of common plates; and which it is."""
        # A draw that rounds to the end of a support has no place in unconstrained space.
        lost = sum(self._is_lost(name, values[name]) for name in self._latents)
        logits = jnp.where(jnp.isnan(log_weight) | (lost > 0), -jnp.inf, log_weight)
        index = jax.random.categorical(rng_key, logits, axis=0)[None]
        dims = self._approx.event_dims
        return {name: take(values[name], index, dims[name])[0] for name in self._latents}, index

    def _map(self, fn: Callable, inputs: Any) -> Any:
        at_once = max(self._approx.chunk_size() // self._approx.num_starts, 1)
        return jax.lax.map(fn, inputs, batch_size=min(at_once, self.num_proposals + 1))

    def _is_lost(self, name: str, values: Array) -> Array | float:
        """How many elements are infinite in unconstrained space, of the shape of the weights."""
        if (support := self._supports.get(name)) is None:
            return 0.0
        event_dim = self._latents[name]["fn"].event_dim

        def of_one(value: Array) -> Array:
            infinite = ~jnp.isfinite(biject_to(support).inv(value))
            infinite = jnp.sum(infinite.reshape(*jnp.shape(value)[: jnp.ndim(value) - event_dim], -1), axis=-1)
            return self._structure.sum_to_level(infinite.astype(float), None)

        return jax.vmap(of_one)(values)

    def _arguments(self, args: tuple, kwargs: Mapping[str, Any] | None) -> tuple[tuple, dict[str, Any]]:
        """The arguments of the fit, which a run may leave out.

        :raises ValueError: for others.
        """
        approx = self._approx
        if not args and not kwargs:
            return approx.args, approx.kwargs
        kwargs = {**approx.svi.static_kwargs, **(kwargs or {})}
        given, own = (args, kwargs), (approx.args, approx.kwargs)
        is_alike = str(jax.tree.structure(given)) == str(jax.tree.structure(own))
        if not is_alike or not all(map(_same, jax.tree.leaves(given), jax.tree.leaves(own))):
            raise ValueError(
                "The arguments of the model are not those of the fit, whose posterior the guide proposes. Run the "
                "chains with the same ones, `mcmc.run(rng_key, *args)`, or without any; or fit again."
            )
        return args, kwargs


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, jax.core.Tracer) or isinstance(other, jax.core.Tracer):
        return jnp.shape(one) == jnp.shape(other)
    if hasattr(one, "dtype") and jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
        one, other = jax.random.key_data(one), jax.random.key_data(other)
    return np.array_equal(one, other, equal_nan=np.issubdtype(np.asarray(one).dtype, np.inexact))


def _checked(kernel: MCMCKernel) -> MCMCKernel:
    """An inner kernel, if it can be one."""
    if not isinstance(kernel, MCMCKernel) or type(kernel).refresh is MCMCKernel.refresh:
        raise NotImplementedError(
            f"`inner_kernel` is {type(kernel).__name__}, but must be a kernel of NumPyro that implements `refresh`: "
            "NUTS, HMC, DiscreteHMCGibbs, DiscreteGibbs, or Gibbs."
        )
    if getattr(kernel, "model", None) is None:
        raise ValueError(
            "`inner_kernel` is built from a potential function, and so does not know the latents. Build it from the "
            "model: `NUTS(model)`."
        )
    return kernel
