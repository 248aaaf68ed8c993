# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Steps of several fits side by side: one compiled program, a progress bar, and what to do about NaN."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from time import perf_counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import Array, Bool, Float, Int
import numpy as np
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState
import tqdm

from numpyro_vimco.arguments import first_of, warn
from numpyro_vimco.compilation import Compiled
from numpyro_vimco.draws.approximation import one_start
from numpyro_vimco.families.units import RealInUnits
from numpyro_vimco.fitting.breakdowns import ruled_out, site_with_nan_density, sites_with_nan_gradients
from numpyro_vimco.fitting.renewing import in_renewed_units
from numpyro_vimco.fitting.state import FitState
from numpyro_vimco.fitting.tempering import TemperedModel
from numpyro_vimco.objectives.elbo import ImportanceWeightedELBO

# Losses are looked at after at most so many steps, and about after so many seconds.
CHUNK_STEPS, CHUNK_SECONDS = 100, 0.5
# So many first steps without a finite loss are enough.
HOPELESS = 100
OF_LOSS = (
    "Take a smaller learning rate, skip such steps (`stable_update=True`; their losses are NaN), leave out tempering "
    '(`tempering=0`), begin elsewhere (`init_loc_fn` of the guide), or take a simpler guide (`structure="mean_field"`).'
)


class Record(NamedTuple):
    """The results of some steps.

    :ivar loss: losses in nats, of shape ``(steps, starts)``; NaN after a start failed.
    :ivar inverse_temperature: of the same shape.
    :ivar nan: for each start that failed in these steps, whether the loss and each parameter, in sorted order, were NaN
        in the first step with any NaN; of shape ``(starts, 1 + parameters)``.
    :ivar failed_at: that step, of shape ``(starts,)``.
    """

    loss: Float[Array, "steps starts"]
    inverse_temperature: Float[Array, "steps starts"]
    nan: Bool[Array, "starts culprits"]
    failed_at: Int[Array, " starts"]


@dataclass(frozen=True)
class Steps:
    """Steps of ``svi`` for all starts. Fields that are not named here are arguments of :func:`.fit`.

    :ivar args: arguments of model and guide.
    :ivar kwargs: keyword arguments of ``svi.update``.
    :ivar units: of the guide's locations.
    :ivar older_loops: as of :class:`.Compiled`.
    :ivar inverse_temperature: from a step, ``tempering_steps`` and ``first_inverse_temperature`` to that of each start.
    """

    svi: SVI
    args: tuple
    kwargs: dict[str, Any]
    units: dict[str, RealInUnits]
    inverse_temperature: Callable[[Array, Array, Array], Array]
    stable_update: bool
    vectorize_starts: bool
    start_sharding: Sharding | None
    older_loops: bool = False

    def run(self, state: FitState, num_steps: int, progress_bar: bool) -> tuple[FitState, np.ndarray, np.ndarray]:
        """Take ``num_steps`` steps; fewer if interrupted.

        :return: the state, and losses and inverse temperatures of shape ``(starts, steps)``.
        :raises ValueError: if all starts failed.
        """
        if self.start_sharding is not None:
            by_start = state.svi, state.tempering_steps, state.failed
            svi_state, tempering_steps, failed = jax.device_put(by_start, self.start_sharding)
            step, first = (jnp.asarray(np.asarray(x)) for x in (state.step, state.first_inverse_temperature))
            state = FitState(svi_state, step, tempering_steps, first, failed)
        done: list[tuple[FitState, Record]] = []
        taken, length = 0, 1
        with tqdm.tqdm(total=num_steps, disable=not progress_bar) as bar:
            try:
                while taken < num_steps:
                    began = perf_counter()
                    length = min(length, num_steps - taken)
                    new, record = self._program(state, length)
                    loss, inverse_temperature, nan, failed_at = jax.device_get(record)
                    done.append((new, Record(loss[:length], inverse_temperature[:length], nan, failed_at)))
                    state, taken = new, taken + length
                    self._report(*done[-1], bar)
                    if int(state.step) == taken:
                        self._check_possible(state, done)
                    bar.update(length)
                    length = 2 * length if perf_counter() - began < CHUNK_SECONDS / 2 else max(length // 2, 1)
                    length = min(length, CHUNK_STEPS)
            except KeyboardInterrupt:
                if not done:
                    raise
                taken = sum(len(record.loss) for _, record in done)
                warn(
                    f"Interrupted after {taken} of {num_steps} steps. This is what there is; go on with "
                    f"`posterior.resume({num_steps - taken})`.",
                )
        none = np.zeros((0, len(state.failed)), np.float32)
        losses = np.concatenate([none, *(np.asarray(record.loss) for _, record in done)])
        temperatures = np.concatenate([none, *(np.asarray(record.inverse_temperature) for _, record in done)])
        return done[-1][0] if done else state, losses.T, temperatures.T

    @cached_property
    def _program(self) -> Callable:
        """The number of steps is an argument, so that runs of any length use one program, and agree bit for bit."""
        return Compiled(self._chunk, older_loops=self.older_loops)

    def _chunk(self, state: FitState, length: Int[Array, ""]) -> tuple[FitState, Record]:
        starts, names = len(state.failed), self._names(state)
        nothing = jnp.zeros((CHUNK_STEPS, starts))  # no NaN, for users of `jax_debug_nans`
        record = Record(nothing, nothing, jnp.zeros((starts, 1 + len(names)), bool), jnp.zeros(starts, int))
        over_starts = jax.vmap if self.vectorize_starts else lambda fn: lambda *xs: jax.lax.map(lambda x: fn(*x), xs)
        advance = over_starts(self._advance)

        def step(i, carry):
            state, record = carry
            beta = self.inverse_temperature(state.step, state.tempering_steps, state.first_inverse_temperature)
            svi_state, loss, nan = advance(state.svi, beta)
            fails = ~state.failed & nan.any(1)
            record = Record(
                record.loss.at[i].set(jnp.where(state.failed, jnp.nan, loss)),
                record.inverse_temperature.at[i].set(beta),
                jnp.where(fails[:, None], nan, record.nan),
                jnp.where(fails, state.step, record.failed_at),
            )
            failed = state.failed | fails
            svi_state = jax.tree.map(partial(where_start, failed), state.svi, svi_state)
            if self.start_sharding is not None:
                svi_state = jax.lax.with_sharding_constraint(svi_state, self.start_sharding)
            return state._replace(svi=svi_state, step=state.step + 1, failed=failed), record

        return jax.lax.fori_loop(0, length, step, (state, record))

    def _advance(self, svi_state: SVIState, inverse_temperature: Array) -> tuple[SVIState, Array, Array]:
        """One step of one start: its state, its loss, and whether the loss and each parameter are NaN."""
        svi = in_renewed_units(self.svi, self.units, svi_state.optim_state)
        svi.model = TemperedModel(self.svi.model, inverse_temperature)
        if isinstance(svi.loss, ImportanceWeightedELBO):
            svi.loss = svi.loss.without_value_checks()  # a fit has made them
        update = svi.stable_update if self.stable_update else svi.update
        svi_state, loss = update(svi_state, *self.args, **self.kwargs)
        params = svi.optim.get_params(svi_state.optim_state)
        # The loss of a step that `stable_update` skips is NaN.
        nan = [jnp.isnan(loss) & (not self.stable_update)]
        for _, param in sorted(params.items()):
            nan.append(jnp.array([(leaf != leaf).any() for leaf in jax.tree.leaves(param)]).any())
        return svi_state, loss, jnp.stack(nan)

    def _of_loss(self, state: FitState, start: int) -> str:
        """What to say where a loss was NaN, after which all gradients are."""
        found = self._looked_at(site_with_nan_density, state, start)
        if not found:
            return OF_LOSS
        name, share = found
        return (
            f"The log-density of the site '{name}' of the model is NaN in {share:.0%} of draws of the guide: there a "
            "parameter of its distribution is outside of its range. Keep it inside, `jnp.maximum(total_count, 0)` for "
            "a number of trials, say. (Draws that are impossible count for nothing, but what follows from them must "
            "be a number.)"
        )

    def _of_gradient(self, state: FitState, start: int) -> str:
        """What to say where losses were finite, and a gradient was NaN: then the model is the cause."""
        found = self._looked_at(sites_with_nan_gradients, state, start) or []
        at = f" at {', '.join(map(repr, found))}" if found else ""
        return (
            f"The losses were finite, so that a gradient is NaN{at}: the model computes something there whose "
            "derivative is infinite, often in the branch of a `jnp.where` that is not taken. Put a `where` inside, "
            "`jnp.log(jnp.where(x > 0, x, 1))`; or skip such steps (`stable_update=True`; their losses are NaN)."
        )

    def _looked_at(self, look: Callable, state: FitState, start: int) -> Any:
        """What is found at the parameters of a start; None if that raises, as the message is more important."""
        svi_state = one_start(state.svi, start)
        kwargs = {**self.svi.static_kwargs, **self.kwargs}
        del kwargs["forward_mode_differentiation"]
        try:
            return look(self.svi, self.svi.get_params(svi_state), svi_state.rng_key, self.args, kwargs)
        except Exception:
            return None

    def _check_possible(self, state: FitState, done: list[tuple[FitState, Record]]) -> None:
        """Raise where every loss of many first steps was infinite.

        :raises ValueError: with the data that rule out all draws.
        """
        if not all(np.isposinf(record.loss).all() for _, record in done):  # of most fits the first says so
            return
        number = sum(len(record.loss) for _, record in done)
        if number < HOPELESS:
            return
        raise ValueError(
            f"In the first {number} steps the losses of all starts were infinite: the guide draws what the data "
            f"rule out, and learns nothing from that. {self._looked_at(ruled_out, state, 0) or ''} Let it begin where "
            'the data are possible: `AutoMixed(model, init_loc_fn=init_to_value(values={"count": seen + 1}))` for a '
            "count of at least what was seen. Or give such data a small probability in the model."
        )

    def _names(self, state: FitState) -> list[str]:
        """Names of the parameters, sorted."""
        return sorted(jax.eval_shape(jax.vmap(self.svi.optim.get_params), state.svi.optim_state))

    def _report(self, state: FitState, record: Record, bar: tqdm.tqdm) -> None:
        """Show how the last steps went, and warn of starts that failed in them."""
        failed = np.asarray(state.failed)
        culprits = ["the loss", *(f"the parameter '{name}'" for name in self._names(state))]
        for i in np.flatnonzero(record.nan.any(1)):
            of_loss = record.nan[i, 0]
            step, where = record.failed_at[i], first_of(np.array(culprits)[record.nan[i]].tolist())
            if failed.all():
                advice = self._of_loss(state, int(i)) if of_loss else self._of_gradient(state, int(i))
                raise ValueError(
                    f"All {len(failed)} starts failed, the last of them in step {step}: NaN came up in {where}. "
                    f"{advice}"
                )
            warn(
                f"Start {i} of {len(failed)} is dropped: in step {step} NaN came up in {where}. The others go on.",
            )
        bound = -record.loss[:, ~failed].mean()
        dropped = f", {failed.sum()} of {len(failed)} starts failed" if failed.any() else ""
        bar.set_postfix_str(
            f"bound: {bound:.4f}, inverse temperature: {record.inverse_temperature[-1].min():.3g}{dropped}",
            refresh=False,
        )


def where_start(condition: Array, x: Array, y: Array) -> Array:
    """``x`` for some starts, else ``y``, with a leading axis for starts."""
    return jnp.where(condition.reshape(-1, *(1,) * (y.ndim - 1)), x, y)
