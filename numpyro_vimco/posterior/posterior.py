# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""The fitted posterior, which owns what is known of it, and :func:`fit`, which makes one."""

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from time import perf_counter
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import Array
import numpy as np
from numpyro.infer import MCMC, SVI
from numpyro.infer.mcmc import MCMCKernel
from numpyro.infer.svi import SVIRunResult, SVIState

from numpyro_vimco.arguments import check_integer, check_key
from numpyro_vimco.diagnostics import verdict
from numpyro_vimco.diagnostics.findings import Finding
from numpyro_vimco.diagnostics.gradient_noise import GradientStatistics, gradient_statistics
from numpyro_vimco.diagnostics.verdict import Diagnostics
from numpyro_vimco.draws.approximation import Approximation, misfit, taken
from numpyro_vimco.export import inference_data, predictions
from numpyro_vimco.export.posterior_draws import PosteriorDraws, draw_posterior, draws_of_chains
from numpyro_vimco.fitting import run
from numpyro_vimco.fitting.run import Fit, Settings
from numpyro_vimco.fitting.state import FitState, Starts
from numpyro_vimco.mcmc.kernel import GuidedMCMC
from numpyro_vimco.planning.plan import STARTS, Plan
from numpyro_vimco.planning.rules import GIB, first_possible, plans
from numpyro_vimco.posterior import tables
from numpyro_vimco.posterior.chains import ChainDiagnostics, diagnose_chains
from numpyro_vimco.posterior.improving import Ways, improve
from numpyro_vimco.randomness import split, split_by_name

# What takes a key of its own, from that of the fit or from one that is given.
KEYS = ("evidence", "diagnose", "draws", "to_arviz", "gradient_snr")
DEFAULT_STEPS = 2000
# What a posterior is made from.
Result: TypeAlias = SVIRunResult | SVIState | FitState | Mapping[str, Any]


def fit(
    model: SVI | Callable,
    rng_key: Array,
    num_steps: int | None = None,
    /,
    *args,
    guide: Callable | None = None,
    optim: Any = None,
    loss: Any = None,
    memory: float = 2 * GIB,
    num_starts: int | None = None,
    tempering: float | Sequence[float] | Callable = 0.5,
    recover: bool = True,
    progress_bar: bool = True,
    stable_update: bool = False,
    forward_mode_differentiation: bool = False,
    init_state: FitState | None = None,
    init_params: dict[str, Any] | None = None,
    vectorize_starts: bool = True,
    start_sharding: Sharding | None = None,
    **kwargs,
) -> "Posterior":
    r"""
    Fit a model several times at once, from starts of their own, with a tempered likelihood.

    Example::

        def model(x):
            loc = numpyro.sample("loc", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
            with numpyro.plate("data", len(x)):
                z = numpyro.sample("z", dist.Bernoulli(0.3))
                numpyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)

        x = jnp.array([4.1, -0.3, 0.2, 3.8, 0.5, -0.1])
        posterior = fit(model, random.key(0), 2000, x)
        print(posterior)
        tree = posterior.to_arviz()

    **The plan.** `fit` reads from the model which latents to sum out, and which have particles of their own in a plate
    or in a chain. It chooses the guide, the objective and the learning rate (``docs/which_objective.md`` has the
    rules). ``posterior.plan`` says what was chosen, and ``posterior.plan.code()`` returns it as Python code. The model
    is not changed, and its marks ``infer={"enumerate": …}`` are kept: ``"parallel"`` for a latent that is summed out,
    None for one that is not. ``guide``, ``optim`` and ``loss`` take the place of what the plan would choose. An
    :class:`SVI` in place of the model has all of these, and is fitted as it is, in place of ``svi.run``.

    One fit may lose a part of the posterior, and nothing that it proposes afterwards shows it. Another start that did
    not lose it does. Starts differ in all their keys, and so in where an automatic guide begins (``init_loc_fn``).

    **Tempering.** The target is :math:`p(z)\,p(x \mid z)^\beta` [1]: the observed sites of the model, factors among
    them, count with an inverse temperature β that rises geometrically to 1, and stays there. It begins at 0.001, or at
    0.1 divided by the spread of the log-likelihood under the prior, if that is less: there the data hardly count. So a
    guide is as wide as the prior when they begin to, and narrows around all that they allow. With samples of each step
    of a chain it begins at 0.03, as proposals that are independent over time cannot follow the prior of a path. Where
    sites are summed out, β acts on p(x | z) with z the sampled latents alone. It is an argument of the compiled step.
    Losses at β < 1 are those of another target.

    **Units.** A step of the optimiser moves a location of an automatic guide of this library by a share of the guide's
    own scale, and of the prior's at most (:mod:`~numpyro_vimco.families.units`). So a program in other units has the
    same fit, and priors may be much wider than the posterior.

    **Recovery.** Starts that begin alike may lose the same part of the posterior together. After the steps, some draws
    take a latent from the model in place of the guide (:mod:`~numpyro_vimco.draws.defence`). If these hold more
    than a fifth of the posterior, a guide is fitted to the weighted draws, and goes on from there by as many steps
    again, at β = 1. The posterior then has the starts, old or new, whose pooled draws have the largest effective sample
    size (:mod:`~numpyro_vimco.fitting.recovery`); ``losses`` and ``state`` stay those of the starts as they were.

    **Learning rate.** It does best if it is held while β rises, and falls by a cosine afterwards::

        schedule = optax.warmup_cosine_decay_schedule(0.01, 0.01, num_steps // 2, num_steps)
        svi = SVI(model, AutoMixed(model), optax.adam(schedule), VIMCOStar(0.5, num_particles=64))
        posterior = fit(svi, random.key(0), num_steps, x)
        print(posterior)
        tree = posterior.to_arviz()

    **Going on.** ``posterior.resume(num_steps)`` takes further steps, bit for bit those that one long run would have
    taken. In another process, ``fit(..., init_state=state)`` goes on from a saved ``posterior.state``: it knows the
    number of steps taken and over how many β rises, which is a share of ``num_steps`` of the *first* call; to plan a
    fit in parts, pass ``tempering`` as a function. Ctrl-C ends a fit with what there is, which can go on too.

    :param model: a NumPyro model, or an `SVI` with any objective, guide and optimiser.
    :param jax.random.key rng_key: random number generator key.
    :param int num_steps: number of steps of each start. Defaults to 2,000 for a model: ``fit(model, rng_key, x=x)``, or
        ``fit(model, rng_key, None, x)``. An `SVI` needs a number. 0 gives the initial state, to load a saved one into.
    :param args: arguments to the model / guide, after the number of steps.
    :param guide: a guide, in place of the plan's :class:`.AutoMixed`. It says which latents are sampled.
    :param optim: an optimiser of NumPyro or optax, in place of Adam with the plan's learning rate.
    :param loss: an objective, in place of the plan's :class:`.VIMCOStar`. It has the numbers of particles.
    :param float memory: what the arrays of a step may take, in bytes, as a plan estimates it: it evaluates particles in
        chunks. Defaults to 2 GiB.
    :param int num_starts: number of starts. Defaults to 4, as many as chains in MCMC, and to 8 if a plan draws 10 or
        more discrete elements together. Where a fit goes on, it is that of ``init_state``.
    :param tempering: share of the steps over which β rises, in [0, 1], or one for each start; 0 for none. Or
        a function from the step (traced, from 0 on) to β, as optax's schedules are; it may return an array of
        shape ``(num_starts,)``. Defaults to 0.5. Where a fit goes on, a share is that of ``init_state``, and a
        function must be passed again.
    :param bool recover: whether to look for a part of the posterior that all starts have lost, and to recover it
        (**Recovery**). Defaults to True; fits of less than 200 steps are not looked at.
    :param bool progress_bar: whether to show the mean bound over starts in nats, β, and how many starts
        failed, and bars for what the posterior computes later. Defaults to True.
    :param bool stable_update: as ``svi.run``: a step whose loss or gradient is not finite is skipped. Defaults to
        False.
    :param bool forward_mode_differentiation: as ``svi.run``. Defaults to False.
    :param FitState init_state: ``state`` of an earlier posterior, to go on from.
    :param dict init_params: as ``svi.run``: parameters to begin with, in all starts.
    :param bool vectorize_starts: True (default) for ``jax.vmap`` over starts; False takes each step for one start after
        the other, with the memory of one.
    :param jax.sharding.Sharding start_sharding: how the axis of starts is spread over devices. Defaults to None: not.
    :param kwargs: keyword arguments to the model / guide.
    :raises ValueError: for a number or a share out of range, an inverse temperature that is not positive, an
        ``init_state`` that is none, a sharding that does not divide the starts, arguments that do not fit model and
        guide, data that are drawn in part or NaN; and if NaN came up in all starts.
    :warns UserWarning: for a model without observed sites, for each start that is dropped since its loss or a parameter
        became NaN, for a loss that is infinite in most steps, for a log evidence that cannot be estimated, and for an
        interruption.

    **References**

    1. *Annealed Importance Sampling*, Radford Neal, arXiv physics/9803008, for the path of targets
    """
    began = perf_counter()
    check_key(rng_key)
    given = {name: x for name, x in (("guide", guide), ("optim", optim), ("loss", loss)) if x is not None}
    _check_model(model, num_steps, given, init_state)
    num_steps = DEFAULT_STEPS if num_steps is None else num_steps
    num_steps = check_integer("num_steps", num_steps, 0, "so many steps are taken; the model's arguments follow it")
    settings = Settings(
        tempering, recover, stable_update, forward_mode_differentiation, vectorize_starts, start_sharding, num_steps
    )

    def begin(svi: SVI, num_starts: int) -> Fit:
        if problem := misfit(svi, args, {**svi.static_kwargs, **kwargs}):
            raise ValueError(
                f"What `fit` was given for the model and the guide does not fit {problem}. Arguments of the model "
                "follow the number of steps as they are, `fit(model, rng_key, 2000, x)`; the number of starts is "
                "`num_starts`."
            )
        if init_state is None:
            return run.begin(svi, rng_key, args, kwargs, settings, num_starts, init_params)
        return run.go_on_from(svi, rng_key, args, kwargs, settings, init_state)

    if isinstance(model, SVI):
        plan, begun = None, begin(model, STARTS if num_starts is None else num_starts)
    else:
        candidates = plans(model, args, kwargs, num_steps, num_starts, given, memory)
        plan, begun = first_possible(candidates, model, begin)
    try:
        fitted = run.run(begun, num_steps, progress_bar)
    except ValueError as error:
        if plan is not None:
            error.add_note(f"What was fitted:\n{plan}")
        raise
    posterior = Posterior._of(fitted, progress_bar, plan)
    posterior.seconds = perf_counter() - began
    return posterior


def _check_model(model: Any, num_steps: Any, given: Mapping[str, Any], init_state: Any) -> None:
    """Raise for what goes with an SVI only, or with a model only."""
    if isinstance(model, SVI):
        if num_steps is None:
            raise ValueError("`num_steps` is None, but an `SVI` has its own schedule: say for how many steps it is.")
        if given:
            name = next(iter(given))
            raise ValueError(
                f"`{name}` is given beside an `SVI`, which has its own. Pass the model in place of the `SVI`, "
                f"`fit(model, rng_key, num_steps, ..., {name}={name})`, or put it into the `SVI`."
            )
        return
    if not callable(model):
        raise ValueError(
            f"`fit` was given {type(model).__name__}, but takes a NumPyro model, `fit(model, rng_key, 2000, x)`, or an "
            "`SVI`."
        )
    if init_state is not None:
        raise ValueError(
            "`init_state` is given beside a model. A state belongs to one guide and optimiser: go on by "
            "`posterior.resume(num_steps)`, or pass the `SVI` that `posterior.plan.code()` makes."
        )


class Posterior:
    """
    A fitted posterior: draws with importance weights, whether to trust them, and the way to ArviZ.

    :func:`~numpyro_vimco.fit` returns one. This makes one from another fit.

    Example, with model and data of :func:`~numpyro_vimco.fit`::

        svi = SVI(model, AutoMixed(model), optax.adam(0.01), VIMCOStar(0.5, num_particles=16))
        posterior = Posterior(svi, svi.run(random.key(0), 2000, x), x)
        print(posterior.verdict, posterior.log_evidence)
        draws = posterior.sample(random.key(1), (4000,))

    What is expensive is computed when it is first asked for, with a progress bar, and kept. Keys come from that of the
    fit, unless one is given. So two calls without a key have the same draws.

    :param SVI svi: the inference object of the fit; with any objective.
    :param result: what ``svi.run`` returned, a state of ``svi.update``, or a dict of parameters; or another posterior
        or its ``state``, whose starts are taken, for other arguments (all data in place of a subsample).
    :param args: arguments of the model, as in the fit; with all data, not a subsample.
    :param kwargs: keyword arguments of the model.
    :raises ValueError: for a result of another kind or of another ``svi``, for arguments that do not fit model and
        guide, for parameters that are NaN, and for data that are drawn in part or NaN.
    """

    #: The state to go on from: of all starts, a pytree of arrays, or that of ``svi.run``.
    state: Any
    #: All starts, side by side (:class:`~numpyro_vimco.fitting.state.Starts`).
    starts: Starts
    #: How the model is fitted (:class:`~numpyro_vimco.planning.plan.Plan`); None where the user gave an `SVI`.
    plan: Plan | None = None
    #: Chains that replace the weighted draws, if :meth:`improve` found them better; else None.
    mcmc: MCMC | None = None
    #: What :meth:`improve` did, with the verdict after each step and the seconds that it took.
    improvements: tuple[str, ...] = ()
    #: How many seconds the fit took; 0 if it is not known.
    seconds: float = 0.0

    def __init__(self, svi: SVI, result: "Result | Posterior", *args, **kwargs):
        if problem := misfit(svi, args, {**svi.static_kwargs, **kwargs}):
            raise ValueError(
                f"What `Posterior` was given for the model and the guide does not fit {problem}. Arguments of the "
                "model follow the result as they are: `Posterior(svi, result, x)`."
            )
        starts, state, rng_key = _starts_of(svi, result)
        kept = starts.kept
        approx = Approximation.of(svi, taken(starts.params, kept), len(kept), args, kwargs)
        if isinstance(state, FitState):
            unknown = np.full(len(starts), np.nan)
            starts = replace(starts, log_evidence=unknown, log_evidence_std_error=unknown)
            if approx.has_posterior():
                starts = run.with_log_evidence(approx, split_by_name(rng_key, KEYS)["evidence"], starts, True)
            approx = run.with_starts(approx, starts)
        self._set(approx, starts, state, rng_key, None, True)

    @classmethod
    def _of(cls, fitted: Fit, progress_bar: bool, plan: Plan | None = None) -> "Posterior":
        posterior = cls.__new__(cls)
        posterior.plan = plan
        posterior._set(
            fitted.approx, fitted.starts, fitted.state, run.keys_of(fitted.rng_key).posterior, fitted, progress_bar
        )
        return posterior

    def _set(
        self, approx: Approximation, starts: Starts, state: Any, rng_key: Array, fitted: Fit | None, progress_bar: bool
    ) -> None:
        self.state = state
        self.starts = replace(starts, _agreement=lambda: self.diagnostics.agreement)
        self._approx, self._rng_key, self._fit = approx, rng_key, fitted
        self._is_several = isinstance(state, FitState)
        self._progress_bar = progress_bar
        self._diagnostics: Diagnostics | None = None
        self._draws: dict[Any, PosteriorDraws] = {}

    @property
    def svi(self) -> SVI:
        """The inference object of the fit; that of the plan, where there is one."""
        return self._approx.svi

    @property
    def params(self) -> dict[str, Any]:
        """Parameters of the best start, without an axis for starts, as ``Predictive`` and ``sample_posterior`` take."""
        return self._approx.params

    @property
    def losses(self) -> np.ndarray:
        """Losses in nats, of shape ``(starts, steps)``, at the inverse temperature of each step."""
        return self.starts.losses

    # Diagnostics.

    def diagnose(
        self, num_draws: int = 10_000, rng_key: Array | None = None, progress_bar: bool | None = None
    ) -> Diagnostics:
        """
        Draw from the fitted guides, and see what the importance weights say. What is found is kept: ``verdict``,
        ``findings``, ``log_evidence`` and what is printed are of the last call. Where there are chains (:attr:`mcmc`),
        verdict and findings are theirs, held against these draws.

        **Defended draws.** One tenth of the draws takes a latent, one of its elements, or all latents from the model in
        place of the guide, and all have the density of that mixture (:mod:`~numpyro_vimco.draws.defence`). So a part of
        the posterior that the guides have lost in one latent is found. What is not found is a part that differs from
        all draws in several latents, or several elements, at once, by more than the prior can guess.

        **Several starts.** Of a fit the draws are pooled: from the guides of all starts, with the density of their
        mixture. Beside them each start is estimated from ``num_draws`` draws of its own guide, and held against the
        pool (``starts.agreement``). And a bound that a start reached earlier, at β = 1, which lies above the log
        evidence of the pool proves that a part of the posterior was lost, since no bound can be above it; that is
        looked for where the objective is known to be a bound and the model has no parameters. A start that is stuck in
        less than a hundredth of the evidence hardly counts in the pool: one such start of four leaves the verdict as it
        is. Not two: with two of four that agree, fits that are wrong were called "good" (``benchmarks/agreement.py``).

        **Parameters of the model.** Where there are any, each start has a posterior of its own, and draws are not
        pooled: they are those of the best start, and the evidence of each, under its own parameters, is compared.

        **k.** From 0.5 on the variance of the weights is infinite, but up to 0.7 smoothed estimates converge nearly as
        fast (Vehtari et al. 2024): where starts agree, it is no reason for less than "good" if the ESS is a quarter of
        the draws (a limit found by ``benchmarks/agreement.py``). Above, k tells from the largest weights of one set of
        draws that *unseen* ones may be so large that they would move its estimates. Defended weights are bounded where
        one latent alone makes them large. So an ESS of a quarter of the draws counts for more than a tail that is
        extrapolated: it is "usable", and "good" if all starts agree.

        Draws are not kept: memory is that of ``3 √num_draws`` weights for each element of plates that are common to all
        sites, of a few sums for each element of each latent, by start, and of a few draws of the model.

        :param int num_draws: number of draws, at least 100; of the pool, and of each start beside it. Defaults to
            10,000: a tail is fitted to them.
        :param jax.random.key rng_key: random number generator key. Defaults to one from that of the fit.
        :param bool progress_bar: whether to show one where it takes more than a few seconds. Defaults to None: as in
            the fit.
        :raises ValueError: for a subsampled plate, a model without latents, a continuous latent that is a Delta in the
            guide, or too few draws.
        :raises NotImplementedError: for starts whose draws cannot be pooled: a Delta site at a parameter.
        """
        key, show = self._key("diagnose", rng_key), self._shows(progress_bar)
        of_fit = self._fit is not None  # losses at other arguments prove nothing
        self._diagnostics = verdict.diagnose(self._approx, self.starts, self._is_several, of_fit, key, num_draws, show)
        vars(self).pop("_of_chains", None)  # which are held against these draws
        return self._diagnostics

    @property
    def diagnostics(self) -> Diagnostics:
        """What :meth:`diagnose` found last; it is called where it was not."""
        return self._diagnostics or self.diagnose()

    @property
    def verdict(self) -> str:
        """One of "good", "usable" and "bad".

        :class:`~numpyro_vimco.diagnostics.verdict.Diagnostics` says what each means, or
        :class:`~numpyro_vimco.posterior.chains.ChainDiagnostics` where there are chains (:attr:`mcmc`).
        """
        return self.diagnostics.verdict if self._of_chains is None else self._of_chains.verdict

    @property
    def findings(self) -> list[Finding]:
        """What to make of it, or what to do, the gravest first: each with a code, a sentence, numbers and a remedy."""
        found = self.diagnostics.findings if self._of_chains is None else self._of_chains.findings
        if self.plan is None or self.verdict == "good":
            return found
        arguments = "random.key(3), seconds=600" if self.improvements else "random.key(2)"
        sentence = 'Remedies can be tried in turn, until the verdict is "good" or the time is over.'
        return [*found, Finding("not-good-yet", sentence, {}, f"posterior = posterior.improve({arguments})")]

    @property
    def log_evidence(self) -> float:
        """Estimate of log p(x), in nats."""
        return self.diagnostics.log_evidence

    @property
    def log_evidence_std_error(self) -> float:
        """Its standard error, in nats; infinite for a k of 1 or more with an ESS below a quarter of the draws."""
        return self.diagnostics.log_evidence_std_error

    @property
    def bounds(self) -> dict[int, float]:
        """The importance-weighted bound in nats, by number of particles."""
        return self.diagnostics.bounds

    @property
    def ess(self) -> float | np.ndarray:
        """Effective sample size of the draws; by element of common plates."""
        return self.diagnostics.ess

    @property
    def pareto_k(self) -> float | np.ndarray:
        """Shape of the tail of the weights; by element of common plates."""
        return self.diagnostics.pareto_k

    def gradient_snr(
        self, rng_key: Array | None = None, num_draws: int = 1000, progress_bar: bool | None = None
    ) -> dict[str, GradientStatistics]:
        """
        Signal-to-noise ratio of the gradient that ``svi`` takes, at ``params``.

        :param jax.random.key rng_key: random number generator key. Defaults to one from that of the fit.
        :param int num_draws: number of gradients, at least 2. Defaults to 1,000: the ratio is then known to about 3% of
            its noise.
        :param bool progress_bar: whether to show one where it takes more than a few seconds. Defaults to None: as in
            the fit.
        :return: the statistics of each parameter; their fields are pytrees where the parameter is one (a neural
            network's).
        :raises ValueError: for too few draws.
        """
        key = self._key("gradient_snr", rng_key)
        return gradient_statistics(self._approx, key, num_draws, self._shows(progress_bar))

    # Draws.

    def sample(self, rng_key: Array, sample_shape: tuple[int, ...] = ()) -> dict[str, Array]:
        """
        Equally weighted draws of the posterior: draws of the guides that are resampled by their importance weights,
        four for each, and of summed sites given these.

        :param jax.random.key rng_key: random number generator key.
        :param tuple sample_shape: shape of the draws. Defaults to (): one draw.
        :return: all latents, of shape ``(*sample_shape, *batch, *event)``, in the support of the model.
        :raises ValueError: for a shape that is no tuple of positive integers, and as :meth:`diagnose`.
        """
        if not isinstance(sample_shape, tuple) or any(not isinstance(n, int) or n < 1 for n in sample_shape):
            raise ValueError(
                f"`sample_shape` is {sample_shape!r}, but must be a tuple of positive integers, such as (1000,)."
            )
        number = int(np.prod(sample_shape))
        latents = self._drawn(rng_key, number).latents
        return {name: jnp.asarray(value.reshape(sample_shape + value.shape[1:])) for name, value in latents.items()}

    def predict(self, rng_key: Array, *args, **kwargs) -> dict[str, np.ndarray]:
        """
        Forecasts, and predictions for new data: the model with other arguments, at 1,000 draws of the posterior, or at
        all of its chains (:attr:`mcmc`).

        Latents that the new program shares with the fit come from the posterior; the rest is drawn from the model. A
        plate of another size has other elements, so that its latents are drawn anew. A series in `scan` goes on where
        that of the fit ends, as does one that `condition` observes. :meth:`to_arviz` without a key has the same draws:
        ``to_arviz(predictions=...)``.

        :param jax.random.key rng_key: random number generator key.
        :param args: arguments of the model, with None for the data that are to be predicted.
        :param kwargs: keyword arguments of the model.
        :return: the sites that are neither observed nor of the posterior, and deterministic ones, of shape
            ``(1000, *batch, *event)``.
        :raises ValueError: for arguments that do not fit the model, where there is nothing to predict, and for a latent
            whose shape changed in a dimension that is neither a plate's nor time in `scan`.
        """
        check_key(rng_key)
        # As many as `to_arviz` has, so that it takes them.
        draws = self._drawn(None, 1000) if self.mcmc is None else self._draws_of(self.mcmc, None, None)
        return predictions.predict(draws, rng_key, args, kwargs, "predictions" if self._progress_bar else None)

    # Chains of MCMC.

    def refine(
        self,
        rng_key: Array,
        num_warmup: int = 500,
        num_samples: int = 1000,
        num_chains: int = 4,
        *,
        inner_kernel: MCMCKernel | None = None,
        num_proposals: int | None = None,
        progress_bar: bool | None = None,
    ) -> MCMC:
        """
        Chains of MCMC that the fit guides, where importance weights do not suffice: :class:`.GuidedMCMC`. They begin at
        weighted draws of each start in turn::

            mcmc = posterior.refine(random.key(1))
            print(posterior.diagnose_chains(mcmc))
            tree = posterior.to_arviz(mcmc)

        :param jax.random.key rng_key: random number generator key.
        :param int num_warmup: number of steps in which the inner kernel adapts. Defaults to 500.
        :param int num_samples: number of draws of each chain. Defaults to 1,000.
        :param int num_chains: number of chains, in one program. Defaults to 4.
        :param MCMCKernel inner_kernel: as of :class:`.GuidedMCMC`.
        :param int num_proposals: likewise.
        :param bool progress_bar: whether to show one. Defaults to None: as in the fit.
        :return: the ``MCMC`` of NumPyro after its run, for ``az.from_numpyro``, ``get_samples`` and
            ``print_summary``.
        :raises ValueError: as :class:`.GuidedMCMC`.
        :raises NotImplementedError: likewise.
        """
        check_key(rng_key)
        first_key, run_key = split(rng_key)
        kernel = GuidedMCMC(self, inner_kernel, num_proposals)
        mcmc = MCMC(
            kernel,
            num_warmup=num_warmup,
            num_samples=num_samples,
            num_chains=num_chains,
            chain_method="vectorized",
            progress_bar=self._shows(progress_bar),
        )
        approx, first = self._approx, kernel.prepare(first_key, num_chains, num_warmup + num_samples)
        mcmc.run(run_key, *approx.args, init_params=first, **approx.kwargs)
        return mcmc

    def diagnose_chains(self, mcmc: MCMC) -> ChainDiagnostics:
        """
        Whether chains of :meth:`refine` can be trusted: by R-hat, the ESS of bulk and tail, how often global steps
        moved, and what the weighted draws say of the same means.

        :param MCMC mcmc: after its run, with a :class:`.GuidedMCMC`.
        :raises ValueError: for anything else.
        """
        if not isinstance(mcmc, MCMC) or not isinstance(mcmc.sampler, GuidedMCMC):
            raise ValueError(
                f"`mcmc` is {type(mcmc).__name__}, but must be what `posterior.refine` returned, or an `MCMC` of a "
                "`GuidedMCMC` after its run."
            )
        known = self.diagnostics.verdict != "bad"
        return diagnose_chains(self._approx.latents(), self.diagnostics.estimates, mcmc, known)

    @cached_property
    def _of_chains(self) -> ChainDiagnostics | None:
        return None if self.mcmc is None else self.diagnose_chains(self.mcmc)

    def improve(self, rng_key: Array, seconds: float = 180.0) -> "Posterior":
        """
        Try remedies in turn until the verdict is "good" or the time is over::

            posterior = posterior.improve(random.key(2))
            print(posterior)

        In this order: more draws, if only their number was too small; the plan of ``fit(model, ...)``, if the fit had
        weights that are products over a plate or a chain; chains of MCMC (:meth:`refine`), which mended more of the
        benchmark posteriors than more steps did (``docs/posteriors.md``); longer chains, if these have not mixed; as
        many steps again, and chains from there, if the plan chose the optimiser; a new fit with four times as many
        particles, if it chose the objective. It returns the posterior with the best verdict. If several have it, it
        returns the latest of those with chains, or else the latest. Each try is another chance for a wrong "good".

        Ctrl-C ends it with the best so far.

        :param jax.random.key rng_key: random number generator key.
        :param float seconds: time after which no step is begun. A step that has begun is finished, so that it may take
            longer. Defaults to 180.
        :return: another posterior; this one stays as it is. Its ``improvements`` say what was done. Where chains are
            best, they are its ``mcmc``, and verdict, findings, draws and what is exported are theirs.
        """
        check_key(rng_key)
        if not seconds > 0:
            raise ValueError(
                f"`seconds` is {seconds!r}, but must be a positive number: no step is begun after so many seconds."
            )
        ways = Ways(
            _with_more_draws,
            _planned,
            lambda posterior, key, number: _with_chains(posterior, posterior.refine(key, num_samples=number)),
            Posterior.resume,
            _with_more_particles,
        )
        posterior, improvements = improve(self, rng_key, seconds, ways, self._progress_bar)
        posterior = posterior._copy()
        posterior.improvements = improvements
        return posterior

    def _copy(self) -> "Posterior":
        posterior = copy(self)
        posterior.starts = replace(self.starts, _agreement=lambda: posterior.diagnostics.agreement)
        posterior._draws = {}
        vars(posterior).pop("_of_chains", None)
        return posterior

    def to_arviz(
        self,
        mcmc: MCMC | None = None,
        *,
        rng_key: Array | None = None,
        num_samples: int = 1000,
        num_proposals: int | None = None,
        resample: bool = True,
        pool: bool = True,
        groups: Collection[str] | str = ("posterior_predictive", "log_likelihood"),
        predictions: Mapping[str, Any] | None = None,
        constant_data: Mapping[str, Any] | None = None,
        coords: Mapping[str, Any] | None = None,
        dims: Mapping[str, list[str]] | None = None,
        progress_bar: bool | None = None,
    ):
        """
        The posterior as ArviZ knows it, from draws of the guide that are resampled by their importance weights. Named
        and ordered after ``arviz.from_numpyro_svi``, which takes draws of the guide as they are.

        Some draws take a latent from the model in place of the guide, and all have the density of that mixture
        (:mod:`~numpyro_vimco.draws.defence`). A fit has several starts, and their draws are pooled in the same way. So
        a part of the posterior that some starts lost is there if one has it. ``pool=False`` shows the starts apart, as
        chains: each has draws of its own guide with its own weights, and ``az.rhat``, ``az.plot_forest`` and
        ``az.plot_trace`` compare them as those of MCMC. Starts that failed are left out. Where the model has
        parameters, each start has a posterior of its own: draws are those of the best start, or of each as a chain.

        Sites that the objective sums out (``infer={"enumerate": "parallel"}``) are drawn from their exact distribution
        given each draw of the others, along chains too.

        Weights are Pareto-smoothed. Where plates are common to all sites, each of their elements has its own, and is
        resampled by itself; elements of a plate of ``plate_particles`` choose among their local particles first.
        Resampled draws repeat: their ESS as a chain means nothing, what counts is the attribute ``ess``.

        All latents of ``num_proposals`` draws are held in memory with three densities for each element of plates that
        are common to all sites, and one value for each datum and draw for each of the groups posterior predictive and
        log-likelihood: 4 GB each for 1,000 draws of a million data.

        :param MCMC mcmc: chains of :meth:`refine`, which are exported in place of resampled draws, with ``moved`` and
            ``diverging`` among the sample_stats; ``r_hat``, ``ess_bulk`` and ``ess_tail``, of the worst element, are
            attributes. What says how to draw (``num_samples`` to ``pool``) is then not used. Defaults to
            None: those of :meth:`improve`, if there are any.
        :param jax.random.key rng_key: random number generator key. Defaults to one from that of the fit: the draws are
            then kept, and the same at the next call.
        :param int num_samples: number of posterior draws. Defaults to 1,000.
        :param int num_proposals: number of draws of the guide to resample from. Defaults to four times ``num_samples``.
        :param bool resample: False keeps ``num_samples`` draws of the guide as they are; their weights are
            ``sample_stats.log_weight``. There are no other proposals then.
        :param bool pool: of several starts: True (default) pools the draws of all starts into one chain, False makes
            each start a chain, with ``num_samples`` draws of as many proposals each.
        :param groups: optional groups to compute, by default the first two:

            - ``"posterior_predictive"``: observed sites drawn anew, given the latents and, where a site depends on
              them, other data. Also where data are missing.
            - ``"log_likelihood"``, for ``az.loo`` and ``az.compare``. Of data in no plate with latents of its own, one
              value for each, under the name of their site. Of a plate that has latents of its own, say ``"site"``, one
              value for each element, under ``"site_element"``: of all data in the element, with its latents averaged
              out by 256 local particles for each draw (as many evaluations of the plate), so that an element is left
              out with its latents. Where a plate is common to all sites it is the element's evidence, the same for all
              draws. Latents that are summed out are summed over, not given a draw. A warning names factors.
            - ``"log_likelihood_given_latents"``: a value for each datum given all latents of the draw.
            - ``"prior"``: draws of the prior, with the group ``prior_predictive``.

            Log-likelihoods and observed data are NaN where data are masked. A site ``x`` with ``obs_mask`` keeps its
            name in all groups; imputed values are in ``posterior["x"]``.
        :param dict predictions: what :meth:`predict` returned: the group ``predictions``.
        :param dict constant_data: data to keep, by name.
        :param dict coords: coordinates by dimension.
        :param dict dims: names of dimensions by site. Others are named by their plates, and by ``infer={"event_dims":
            [...]}`` of their site.
        :param bool progress_bar: whether to show one where it takes more than a few seconds. Defaults to None: as in
            the fit.
        :return: an ``InferenceData`` (ArviZ 0.x) or ``DataTree`` (1.x) with the groups posterior (with deterministic
            sites), sample_stats (``log_weight``, ``log_p``, ``log_q`` in nats; by element of common plates),
            observed_data, and those asked for. Attributes of the posterior: the library and its version, objective, its
            alpha and number of particles, number of steps if losses are known, number of proposals, ``log_evidence``
            (nats), ``pareto_k`` and ``ess`` (of the worst element). Where the guide fixes a continuous latent by a
            Delta, the evidence is NaN.
        :raises ValueError: for a subsampled plate, a model without latents, no draws, fewer proposals than draws,
            proposals beside ``resample=False``, an unknown group, or ``rng_key`` that is no key.
        :raises NotImplementedError: for starts whose draws cannot be pooled: a Delta site at a parameter.
        :warns UserWarning: for a plate with latents of its own that cannot be averaged out of its log-likelihood, and
            for an observed site whose distribution cannot be sampled.
        """
        num_samples = check_integer("num_samples", num_samples, 1, "it is the number of posterior draws")
        if num_proposals is not None and not resample:
            raise ValueError(
                "`num_proposals` is given, but with `resample=False` draws are not chosen among proposals: "
                "`num_samples` draws of the guide are kept as they are. Leave `num_proposals` out."
            )
        if num_proposals is None:
            num_proposals = 4 * num_samples if resample else num_samples
        num_proposals = check_integer(
            "num_proposals", num_proposals, num_samples, "draws are chosen among them, and each should be there once"
        )
        steps = self.losses.shape[1]
        attributes: dict[str, Any] = {
            **({"num_steps": steps} if steps else {}),
            **({"starts": self.starts.kept} if self._is_several else {}),
        }
        mcmc = self.mcmc if mcmc is None else mcmc
        if mcmc is None:
            draws = self._draw(rng_key, num_samples, num_proposals, resample, pool, progress_bar)
            attributes["num_proposals"] = num_proposals
        else:
            of_chains = (self._of_chains if mcmc is self.mcmc else None) or self.diagnose_chains(mcmc)
            attributes |= of_chains.attributes()
            draws = self._draws_of(mcmc, rng_key, progress_bar)
        return inference_data.to_arviz(
            draws,
            self._key("to_arviz", rng_key),
            groups=groups,
            predictions=predictions,
            constant_data=constant_data,
            coords=coords,
            dims=dims,
            attributes=attributes,
            progress_bar=self._shows(progress_bar),
        )

    def _drawn(self, rng_key: Array | None, number: int) -> PosteriorDraws:
        """So many draws of equal weight, of the chains if there are any."""
        if self.mcmc is None:
            # Of few draws the best of four is no draw of the posterior.
            return self._draw(rng_key, number, max(4 * number, 1000), True, True, None)
        return self._draws_of(self.mcmc, rng_key, None).some(self._key("to_arviz", rng_key), number)

    def _draws_of(self, mcmc: MCMC, rng_key: Array | None, progress_bar: bool | None) -> PosteriorDraws:
        """All draws of chains."""
        weighted, key = self._draw(None, 1000, 4000, True, True, progress_bar), self._key("draws", rng_key)
        return draws_of_chains(self._approx, key, mcmc, weighted.log_evidence, self._shows(progress_bar))

    def _draw(
        self,
        rng_key: Array | None,
        num_samples: int,
        num_proposals: int,
        resample: bool,
        pool: bool,
        progress_bar: bool | None,
    ) -> PosteriorDraws:
        about = num_samples, num_proposals, resample, pool
        if rng_key is None and about in self._draws:
            return self._draws[about]
        key = self._key("draws", rng_key)
        draws = draw_posterior(self._approx, key, *about, progress_bar=self._shows(progress_bar))
        if rng_key is None:
            self._draws = {about: draws}  # they are large: the last ones
        return draws

    # Going on.

    def resume(self, num_steps: int, progress_bar: bool | None = None) -> "Posterior":
        """
        So many steps more, bit for bit those that one long run would have taken. A plan's learning rate ends at zero;
        steps behind its end get a new cosine.

        :param int num_steps: number of steps.
        :param bool progress_bar: whether to show one. Defaults to None: as in the fit.
        :return: another posterior; this one stays as it is.
        :raises ValueError: for a posterior that was made from parameters alone, and if NaN came up in all starts.
        """
        num_steps = check_integer("num_steps", num_steps, 0, "so many steps are taken")
        show, approx = self._shows(progress_bar), self._approx
        if self._fit is not None:
            began = perf_counter()
            posterior = Posterior._of(run.run(self._going_on(num_steps), num_steps, show), show, self.plan)
            posterior.seconds = perf_counter() - began
            return posterior
        if not isinstance(self.state, SVIState):
            raise ValueError(
                "This posterior was made from parameters or another posterior's starts, and does not know the "
                "optimiser's state or the schedule. Go on by `posterior.resume` of what `fit` returned, or by "
                "`fit(..., init_state=state)`."
            )
        args, kwargs = approx.args, {k: v for k, v in approx.kwargs.items() if k not in approx.svi.static_kwargs}
        result = approx.svi.run(self._rng_key, num_steps, *args, init_state=self.state, progress_bar=show, **kwargs)
        losses = np.concatenate([self.losses[0], np.asarray(result.losses)])
        return Posterior(approx.svi, result._replace(losses=jnp.asarray(losses)), *args, **kwargs)

    def _going_on(self, num_steps: int) -> Fit:
        """The fit, with a learning rate for so many more steps where the plan chose one: its own ends at zero."""
        fitted = self._fit
        assert fitted is not None
        if self.plan is None or "optim" in self.plan.given or not num_steps:
            return fitted
        svi = copy(fitted.steps.svi)
        svi.optim = self.plan.optim_after(self.losses.shape[1], num_steps)
        return replace(fitted, steps=replace(fitted.steps, svi=svi))

    # Printing.

    def __repr__(self) -> str:
        number, steps = self.losses.shape
        found = "not diagnosed yet" if self._diagnostics is None else f"verdict {self._diagnostics.verdict!r}"
        return f"<Posterior: {number} start{'s' * (number > 1)} of {steps:,} steps, {found}>"

    def __str__(self) -> str:
        return tables.as_text(*self._table())

    def _repr_html_(self) -> str:
        return tables.as_html(*self._table())

    def _table(self) -> tuple[dict[str, str], list[Finding]]:
        before = {} if self.plan is None else {"plan": "; ".join(self.plan.lines())}
        if self.improvements:
            before["improved"] = "; ".join(self.improvements)
        try:
            about = tables.rows(self.diagnostics)
            if self._of_chains is not None:
                evidence = f'{about["log evidence"]}, by weights: "{about["verdict"]}"'
                about = {"verdict": self.verdict, "log evidence": evidence, **self._of_chains.rows()}
            return {**before, **about}, self.findings
        except (ValueError, NotImplementedError) as error:  # there is no verdict, and the reason is what can be said
            return {**before, "verdict": "none"}, [Finding("no-verdict", str(error))]

    # Small help.

    def _key(self, name: str, given: Array | None) -> Array:
        if given is not None:
            check_key(given)
        return split_by_name(self._rng_key if given is None else given, KEYS)[name]

    def _shows(self, progress_bar: bool | None) -> bool:
        return self._progress_bar if progress_bar is None else progress_bar


def _with_more_draws(posterior: Posterior, number: int) -> Posterior:
    posterior = posterior._copy()
    posterior.diagnose(number)
    return posterior


def _with_chains(posterior: Posterior, mcmc: MCMC) -> Posterior:
    posterior = posterior._copy()
    posterior.mcmc = mcmc
    return posterior


def _planned(posterior: Posterior, rng_key: Array) -> Posterior:
    """A new fit of the model as it is planned."""
    return _fitted_again(posterior, posterior.svi.model, rng_key)


def _with_more_particles(posterior: Posterior, rng_key: Array) -> Posterior:
    """A new fit by the plan, with four times as many particles."""
    assert posterior.plan is not None
    plan = replace(posterior.plan, num_particles=4 * posterior.plan.num_particles)
    svi = copy(posterior.svi)
    svi.loss = plan.loss()
    again = _fitted_again(posterior, svi, rng_key, plan.num_starts)
    again.plan = plan
    return again


def _fitted_again(
    posterior: Posterior, model: SVI | Callable, rng_key: Array, num_starts: int | None = None
) -> Posterior:
    approx, steps = posterior._approx, max(posterior.losses.shape[1], DEFAULT_STEPS)
    options: dict[str, Any] = {"num_starts": num_starts, "progress_bar": posterior._shows(None)}
    return fit(model, rng_key, steps, *approx.args, **options, **approx.kwargs)  # a plan's SVI has no static ones


def _starts_of(svi: SVI, result: "Result | Posterior") -> tuple[Starts, Any, Array]:
    """The starts that a result is of, the state to go on from, and a key.

    :raises ValueError: for anything else, and for a state of an ``svi`` that was never initialised.
    """
    if isinstance(result, Posterior):
        return result.starts, result.state, result._rng_key
    if isinstance(result, SVIState | FitState) and svi.constrain_fn is None:
        raise ValueError(
            "A state was given, but this `svi` was never initialised, so that it does not know the constraints of "
            "its parameters. Call `svi.init(rng_key, *args)` once, or pass the parameters."
        )
    if isinstance(result, FitState):
        failed, nothing = np.asarray(result.failed), np.zeros((len(result.failed), 0), np.float32)
        params = jax.vmap(svi.get_params)(result.svi)
        starts = Starts.without_evidence(params, nothing, nothing, result.svi, failed)
        return starts, result, split(result.svi.rng_key[0], 3)[2]
    losses, state, rng_key = np.zeros(0, np.float32), None, jax.random.key(0)
    if isinstance(result, SVIRunResult):
        params, state, losses = result.params, result.state, np.asarray(result.losses)
    elif isinstance(result, SVIState):
        params, state = svi.get_params(result), result
    elif isinstance(result, Mapping):
        params = dict(result)
    else:
        raise ValueError(
            f"A posterior cannot be made from {type(result).__name__}: pass what `svi.run` returned, a state of "
            "`svi.update`, or a dict of parameters, and then the model's arguments, `Posterior(svi, result, x)`."
        )
    if state is not None:
        rng_key = split(state.rng_key, 3)[2]  # the first two are those of the next step
    one = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], params)
    of_one = np.ones((1, len(losses)), np.float32)
    return Starts.without_evidence(one, losses[None], of_one, None, np.zeros(1, bool)), state, rng_key
