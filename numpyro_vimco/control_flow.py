# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Given values of latents, inside of `scan` and `cond` too.

NumPyro runs the body of `scan` and the branches of `cond` on their own, and shows their sites to the handlers around
them afterwards, when values are drawn. So a handler that decides about values must be carried inside: it wraps the
functions that are arguments of the `control_flow` message. Handlers that change densities only need not.

Private parts of NumPyro are these arguments, and the mark `_control_flow_done` of a site that is shown afterwards; they
were seen in NumPyro 0.20, the oldest that is admitted, and in 0.22.
"""

from collections.abc import Callable, Collection, Mapping
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpyro
from numpyro.primitives import Messenger

# Marks that are made here, in `infer` of sites inside: of those in `scan`, and of those that were given their value.
_IN_SCAN, _GIVEN = "_in_scan", "_given"


def is_in_scan(site: dict) -> bool:
    """Whether a site is inside of `scan`, in a trace of :class:`Given`: its value has a leading dimension for time."""
    return _IN_SCAN in site["infer"]


def is_of_control_flow(site: dict) -> bool:
    """Whether a site was drawn inside of `scan` or `cond`, and is shown to handlers around them afterwards."""
    return site.get("_control_flow_done", False)


def in_turn(site: dict, x: Array, axis: int = 0) -> Array:
    """An array with an axis for time, in the order in which `scan` passes through it; the same array outside of it."""
    return jnp.flip(x, axis) if site["infer"].get(_IN_SCAN) == "reverse" else x


def is_scan(msg: dict) -> bool:
    """Whether a message is that of a `scan`."""
    return msg["type"] == "control_flow" and "history" in msg["kwargs"]


def carry_inside(msg: dict, wrap: Callable[[Callable], Callable]) -> None:
    """Wrap the programs of a message of control flow: the body of a `scan`, both branches of a `cond`."""
    programs = {0} if is_scan(msg) else {1, 2}
    msg["args"] = tuple(wrap(x) if i in programs else x for i, x in enumerate(msg["args"]))


def length_of(xs: Any, length: int | None) -> int:
    """The number of steps of a `scan` with these arguments."""
    return len(jax.tree.leaves(xs)[0]) if length is None else length


class Scans(Messenger):
    """Which `scan` of a program draws each of its sites.

    :ivar found: the number of the scan, by site.
    """

    def __init__(self, fn: Callable):
        super().__init__(fn)
        self.found: dict[str, int] = {}

    def __enter__(self):
        self._met: list[bool] = []
        return super().__enter__()

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "control_flow":
            self._met.append(is_scan(msg))
        elif msg["type"] == "sample" and is_of_control_flow(msg) and self._met[-1]:
            self.found[msg["name"]] = len(self._met)


class Given(Messenger):
    """A program whose latents have given values; those without are drawn.

    Handlers of NumPyro do not get everywhere: `replay` does not reach into `cond`, nor `substitute` into nested `scan`,
    and both take the values of a `scan` with ``reverse=True`` from the wrong end. Here they are one more input of it.

    :param values: by latent, as in a trace: inside of `scan` with a leading dimension for time.
    :raises ValueError: inside of control flow, for a parameter, for a subsampled plate, and for values without time;
        everywhere, for values of another shape.
    """

    def __init__(self, fn: Callable, values: Mapping[str, Array]):
        super().__init__(fn)
        self.values = values

    def process_message(self, msg: dict) -> None:
        if is_scan(msg):
            msg["args"] = self._in_scan(*msg["args"])
        elif msg["type"] == "control_flow":
            carry_inside(msg, lambda branch: _Inside(branch, self.values))
        elif msg["type"] == "sample" and msg["name"] in self.values and not msg["is_observed"]:
            if msg["value"] is None:
                self._give(msg)
            elif is_of_control_flow(msg) and not msg["infer"].get(_GIVEN, False):
                raise _without_time_error(msg, self.values[msg["name"]])

    def _give(self, msg: dict) -> None:
        msg["value"] = self.values[msg["name"]]
        _check_shape(msg)

    def _in_scan(self, body: Callable, init, xs, length: int | None, reverse: bool) -> tuple:
        length = length_of(xs, length)
        # All that may be inside; a value from outside that is as long does no harm, as names are unique.
        series = {name: value for name, value in self.values.items() if jnp.shape(value)[:1] == (length,)}

        def given_body(carry, at_time):
            values, x = at_time
            return _InScan(body, values, reverse)(carry, x)

        return given_body, init, (series, xs), length, reverse


class _SummedOut(Messenger):
    """A program some of whose latents are marked ``infer={"enumerate": "parallel"}``.

    :ivar met: names of these, as far as they were met.
    """

    def __init__(self, fn: Callable | None, names: Collection[str], met: set[str]) -> None:
        super().__init__(fn)
        self.names, self.met = names, met

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "control_flow":
            carry_inside(msg, lambda program: _SummedOut(program, self.names, self.met))
        elif msg["type"] == "sample" and msg["name"] in self.names:
            self.met.add(msg["name"])
            if not msg["is_observed"]:
                msg["infer"] = {**msg["infer"], "enumerate": "parallel"}


def sum_out(model: Callable, names: Collection[str]) -> Callable:
    """
    The model with marks ``infer={"enumerate": "parallel"}`` at some of its latents, inside of `scan` and `cond` too.

    It is what `config_enumerate` of NumPyro does for all latents, and only outside of control flow.

    Example, with the model of :func:`~numpyro_vimco.fit`::

        model = sum_out(model, {"z"})
        svi = SVI(model, AutoMixed(model), optax.adam(0.01), VIMCOStar(0.5, num_particles=64))

    :param callable model: a NumPyro model, which stays as it is.
    :param names: names of the latents.
    :raises ValueError: when the model is called, for a name that it does not sample.
    """
    return with_marks(model, frozenset([names] if isinstance(names, str) else names), True)


def with_marks(model: Callable, names: Collection[str], all_are_met: bool) -> Callable:
    """What :func:`sum_out` makes.

    :param all_are_met: whether each call of the model must sample all of them.
    """

    @wraps(model)
    def marked(*args: Any, **kwargs: Any) -> Any:
        met: set[str] = set()
        with _SummedOut(None, names, met):
            result = model(*args, **kwargs)
        if all_are_met and (missing := set(names) - met):
            raise ValueError(
                f"`sum_out` names '{min(missing)}', but the model samples no such site. Give the names of latents."
            )
        return result

    return marked


class _Inside(Given):
    """The same inside of control flow, where `seed` is around it.

    A given site takes a key all the same, so that the keys of others do not depend on what is given.
    """

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "param":
            raise ValueError(
                f"Parameter '{msg['name']}' is declared inside of `scan` or `cond`, where NumPyro does not fit it. "
                f"Call numpyro.param('{msg['name']}', …) before, and use its value inside."
            )
        if msg["type"] == "plate" and msg["args"][1] not in (None, msg["args"][0]):
            raise ValueError(
                f"Plate '{msg['name']}' is subsampled inside of `scan` or `cond`, where model and guide, and each "
                "particle at each time, would have another subsample. Use the full plate there."
            )
        super().process_message(msg)

    def _give(self, msg: dict) -> None:
        super()._give(msg)
        msg["infer"] = {**msg["infer"], _GIVEN: True}
        if msg["kwargs"]["rng_key"] is None:
            msg["kwargs"]["rng_key"] = numpyro.prng_key()


class _InScan(_Inside):
    """The same inside of `scan`, where sites are marked."""

    def __init__(self, fn: Callable, values: Mapping[str, Array], reverse: bool):
        super().__init__(fn, values)
        self.direction = "reverse" if reverse else "forward"

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "sample":
            msg["infer"] = {**msg["infer"], _IN_SCAN: self.direction}
        super().process_message(msg)


def _check_shape(site: dict) -> None:
    """Raise unless the value of a latent broadcasts against its distribution.

    :raises ValueError: naming the site.
    """
    given, expected = jnp.shape(site["value"]), site["fn"].shape(site["kwargs"]["sample_shape"])
    try:
        jnp.broadcast_shapes(given, expected)
    except ValueError:
        raise ValueError(
            f"Model and guide shapes disagree at site '{site['name']}': {expected} vs {given}. Give it the same plates "
            "and events in both; after a fit, the arguments that it was fitted with."
        ) from None


def _without_time_error(site: dict, value: Array) -> ValueError:
    """A latent in `scan` with values that are not one for each time."""
    return ValueError(
        f"The model draws '{site['name']}' inside of `scan`, at {len(site['value'])} times, but its value in the guide "
        f"has the shape {jnp.shape(value)}, which does not begin with the times. Draw it inside of `scan` in the guide "
        "as well, or with a first dimension for time; after a fit, pass the arguments that it was fitted with."
    )
