"""Fit the guide, with checkpoints."""

from collections.abc import Iterator
import hashlib
import os
from pathlib import Path
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import SVI
from numpyro.infer.elbo import ELBO
from numpyro.infer.svi import SVIRunResult, SVIState
import optax
from tqdm.auto import tqdm

from . import InputError
from .alignment import Alignment
from .model import guide, model
from .subsplits import Support

FIRST = 0.001  # inverse temperature


def inverse_temperature(step, num_steps: int):
    """The inverse temperature of the likelihood: rises from a small one to 1 over the first half of the fit.

    At a small one all topologies of the support are about as probable, so that the guide meets them all before it
    has to choose.
    """
    return jnp.minimum(1.0, FIRST + (1 - FIRST) * 2 * step / num_steps)


def make_svi(objective: ELBO, num_steps: int, learning_rate: float, pairs: bool = True) -> SVI:
    """SVI by Adam, with a learning rate that falls to 1 % of it over the second half of the fit."""
    schedule = optax.warmup_cosine_decay_schedule(
        learning_rate, learning_rate, num_steps // 2, num_steps, 0.01 * learning_rate
    )
    return SVI(model, guide, optax.adam(schedule), objective, pairs=pairs)


def train(
    svi: SVI, state: SVIState, args: tuple, num_steps: int, first: int = 0, turns: int = 100
) -> Iterator[tuple[int, SVIState, jax.Array]]:
    """Train in turns: the number of steps done, the state, and the losses after each.

    :param first: number of steps that are done already.
    :param turns: into how many parts of a whole number of steps `num_steps` are split.
    """
    size = max(1, num_steps // turns)

    @jax.jit
    def turn(state, steps):
        betas = inverse_temperature(steps, num_steps)
        return jax.lax.scan(lambda state, beta: svi.update(state, *args, beta), state, betas)

    for begin in range(first, num_steps, size):
        end = min(begin + size, num_steps)
        state, losses = turn(state, jnp.arange(begin, end))
        yield end, state, losses


def fit(
    trees: Support,
    alignment: Alignment,
    objective: ELBO,
    num_steps: int,
    learning_rate: float = 0.003,
    pairs: bool = True,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress_bar: bool = True,
) -> tuple[SVI, SVIRunResult]:
    """Fit the guide by SVI.

    :param objective: such as `VIMCOStar(num_particles=10)`.
    :param pairs: whether branch lengths are also looked up by primary subsplit pair.
    :param checkpoint: a file to save the fit in, a hundred times, and to go on from where it exists.
    :returns: the SVI object, and the result; its losses are those since the start or since the fit was taken up.
    :raises InputError: if the checkpoint is that of a fit with other settings or data.
    """
    svi = make_svi(objective, num_steps, learning_rate, pairs)
    state, done = svi.init(jax.random.PRNGKey(seed), trees, alignment), 0
    settings = _settings(trees, alignment, objective, num_steps, learning_rate, pairs, seed)
    if checkpoint is not None:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        if checkpoint.exists():
            state, done = _restore(checkpoint, state, settings)
    losses = [jnp.zeros(0)]
    with tqdm(total=num_steps, initial=done, disable=not progress_bar, unit="step") as bar:
        turns = train(svi, state, (trees, alignment), num_steps, done)
        for done, state, loss in turns:
            losses.append(loss)
            beta = inverse_temperature(done, num_steps)
            bar.set_postfix_str(f"bound {-jnp.mean(loss):.2f}, β {beta:.2f}", refresh=False)
            bar.update(done - bar.n)
            if checkpoint is not None:
                _save(checkpoint, state, done, settings)
    return svi, SVIRunResult(svi.get_params(state), state, jnp.concatenate(losses))


def _settings(trees: Support, alignment: Alignment, objective: ELBO, *numbers) -> str:
    """All that a fit depends on."""
    data = hashlib.sha256(repr((alignment.taxa, trees.clades)).encode())
    for array in (alignment.tips, alignment.counts, trees.options, trees.splits):
        data.update(np.asarray(array).tobytes())
    # Names of functions, for their addresses differ between processes.
    options = {name: getattr(value, "__qualname__", value) for name, value in vars(objective).items()}
    return repr((type(objective).__name__, options, *numbers, data.hexdigest()[:16]))


def _save(path: Path, state: SVIState, done: int, settings: str):
    leaves = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(state))}
    new = path.with_name(path.name + ".new.npz")
    np.savez(new, done=done, settings=settings, **leaves)
    os.replace(new, path)  # never half a file


def _restore(path: Path, state: SVIState, settings: str) -> tuple[SVIState, int]:
    try:
        with np.load(path) as saved:
            leaves = [jnp.asarray(saved[name]) for name in saved.files if name.isdigit()]
            done, fitted = int(saved["done"]), str(saved["settings"])
    except (ValueError, KeyError, BadZipFile) as error:
        raise InputError(f"{path}: no checkpoint of a fit; name another file.") from error
    if fitted != settings:
        raise InputError(
            f"{path}: the checkpoint of a fit with other settings or data ({fitted}, not {settings}); delete it, or "
            "name another file."
        )
    return jax.tree.unflatten(jax.tree.structure(state), leaves), done
