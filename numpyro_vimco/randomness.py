# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""The one owner of randomness: every key of this package is derived here.

The rule: a key is either split once, into as many keys as are needed, or used by one consumer; never both, and never
twice. Nothing here uses ``fold_in``, as with JAX's default keys ``fold_in(key, i)`` is ``split(key)[i]``. A test checks
that no other module derives keys.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from numpyro.primitives import Messenger

from numpyro_vimco.compilation import ONCE, Compiled
from numpyro_vimco.private.of_jax import trace_state_clean

# The mark of a site of a chain, and of its `scan`, in `infer`: the name of the chain.
CHAIN = "_chain"

__all__ = [
    "CHAIN",
    "ArrayParams",
    "ParticleKeys",
    "SeedLevels",
    "SeedPlates",
    "generator",
    "particle_keys",
    "split",
    "split_by_name",
    "split_into",
]


def split(rng_key: Array, num: int | tuple[int, ...] = 2) -> Array:
    """An array of keys, as of ``jax.random.split``."""
    return _splitting(num, _settings())(rng_key) if _is_alone(rng_key) else jax.random.split(rng_key, num)


def split_into(rng_key: Array, number: int) -> list[Array]:
    """The same keys, one by one. Outside of a program, one program makes up to 8, if the first are those of fewer."""
    is_prefix, *_ = settings = _settings()
    if _is_alone(rng_key) and number <= 8 and is_prefix:
        return list(_eight(settings)(rng_key)[:number])
    return list(split(rng_key, number))


def _is_alone(rng_key: Array) -> bool:
    return trace_state_clean() and not isinstance(rng_key, jax.core.Tracer)


def _settings() -> tuple[bool, str]:
    """What the keys of a split depend on beside the key."""
    config: Any = jax.config
    return config.jax_threefry_partitionable, config.jax_default_prng_impl


@cache
def _splitting(num: int | tuple[int, ...], settings: tuple[bool, str]) -> Callable[[Array], Array]:
    return Compiled(lambda rng_key: jax.random.split(rng_key, num), ONCE)


@cache
def _eight(settings: tuple[bool, str]) -> Callable[[Array], tuple[Array, ...]]:
    return Compiled(lambda rng_key: tuple(jax.random.split(rng_key, 8)), ONCE)


def split_by_name(rng_key: Array, names: Iterable[str]) -> dict[str, Array]:
    """A key for each name."""
    names = list(names)
    return dict(zip(names, split_into(rng_key, len(names)))) if names else {}


def generator(rng_key: Array) -> np.random.Generator:
    """A generator of NumPy that has the randomness of a key."""
    data = jax.random.key_data(rng_key) if jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key) else rng_key
    return np.random.default_rng(np.asarray(data))


class ParticleKeys(NamedTuple):
    """The keys of one particle.

    :ivar model: for sample statements of the model that the guide has no value for.
    :ivar guide: for the guide's sites outside of named plates.
    :ivar local: for each named plate, one key for each of its local particles.
    """

    model: Array
    guide: Array
    local: dict[str, Array]


def particle_keys(rng_key: Array, plate_particles: Mapping[str, int]) -> ParticleKeys:
    """The keys of one particle; without named plates the same as in :class:`numpyro.infer.RenyiELBO`.

    :param plate_particles: number of local particles of each named plate.
    """
    model, guide, *local = split(rng_key, 2 + len(plate_particles))
    keys = {name: split(key, number) for (name, number), key in zip(plate_particles.items(), local)}
    return ParticleKeys(model, guide, keys)


class SeedLevels(Messenger):
    """`numpyro.handlers.seed`, with a key of its own for each named plate and each chain."""

    def __init__(self, fn: Callable, key: Array, local_keys: Mapping[str, Array]):
        super().__init__(fn)
        self.keys: dict[str | None, Array] = {None: key}
        self.keys.update(local_keys)

    def process_message(self, msg: dict) -> None:
        if msg["type"] in ("sample", "prng_key", "plate", "control_flow") and _wants_key(msg):
            names = [msg.get("infer", {}).get(CHAIN), *(frame.name for frame in msg.get("cond_indep_stack", ()))]
            level = next((name for name in names if name is not None and name in self.keys), None)
            self.keys[level], msg["kwargs"]["rng_key"] = split(self.keys[level])


class SeedPlates(Messenger):
    """Gives a subsampled plate the same key in model and guide and for all particles, so that it has one subsample.

    The first plate has the key that :class:`numpyro.infer.RenyiELBO` gives it.

    :param names: names of plates in the order in which they were met; one list for the handlers of model and guide.
    """

    def __init__(self, fn: Callable, key: Array, names: list[str]):
        super().__init__(fn)
        self.key, self.names = key, names

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "plate" and _wants_key(msg):
            if msg["name"] not in self.names:
                self.names.append(msg["name"])
            rest = self.key
            for _ in range(self.names.index(msg["name"]) + 1):
                rest, msg["kwargs"]["rng_key"] = split(rest)


class ArrayParams(Messenger):
    """Makes JAX arrays of parameters that begin as NumPy's, which no value that JAX traces could be an index of."""

    def postprocess_message(self, msg: dict) -> None:
        if msg["type"] == "param":
            msg["value"] = jax.tree.map(jnp.asarray, msg["value"])


def _wants_key(msg: dict) -> bool:
    return msg["kwargs"]["rng_key"] is None and msg["value"] is None
