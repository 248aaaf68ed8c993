# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Given values of latents, inside of `scan` and `cond` too.

NumPyro runs the body of `scan` and the branches of `cond` on their own, and shows their sites to the handlers around
them afterwards, when values are drawn. So a handler that decides about values must be carried inside: it wraps the
functions that are arguments of the `control_flow` message. Handlers that change densities only need not.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpyro
from numpyro.primitives import Messenger

_IN_SCAN = "_in_scan"


def is_in_scan(site: dict) -> bool:
    """Whether a site is inside of `scan`, in a trace of :class:`Given`: its value has a leading dimension for time."""
    return site["infer"].get(_IN_SCAN, False)


class Given(Messenger):
    """A program whose latents have given values; those without are drawn.

    Handlers of NumPyro do not get everywhere: `replay` does not reach into `cond`, nor `substitute` into nested `scan`,
    and both take the values of a `scan` with ``reverse=True`` from the wrong end. Here they are one more input of it.

    :param values: by latent, as in a trace: inside of `scan` with a leading dimension for time.
    """

    def __init__(self, fn: Callable, values: Mapping[str, Array]):
        super().__init__(fn)
        self.values = values

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "control_flow":
            inside = self._in_scan if "history" in msg["kwargs"] else self._in_cond
            msg["args"] = inside(*msg["args"])
        elif msg["type"] == "sample" and msg["name"] in self.values and msg["value"] is None:
            self._give(msg)

    def _give(self, msg: dict) -> None:
        msg["value"] = self.values[msg["name"]]

    def _in_cond(self, pred, true_fun: Callable, false_fun: Callable, operand) -> tuple:
        inside = _InScan if isinstance(self, _InScan) else _Inside
        return pred, inside(true_fun, self.values), inside(false_fun, self.values), operand

    def _in_scan(self, body: Callable, init, xs, length: int | None, reverse: bool) -> tuple:
        length = len(jax.tree.leaves(xs)[0]) if length is None else length
        # All that may be inside; a value from outside that is as long does no harm, as names are unique.
        series = {name: value for name, value in self.values.items() if jnp.shape(value)[:1] == (length,)}

        def given_body(carry, at_time):
            values, x = at_time
            return _InScan(body, values)(carry, x)

        return given_body, init, (series, xs), length, reverse


class _Inside(Given):
    """The same inside of control flow, where `seed` is around it.

    A given site takes a key all the same, so that the keys of others do not depend on what is given.
    """

    def _give(self, msg: dict) -> None:
        super()._give(msg)
        if msg["kwargs"]["rng_key"] is None:
            msg["kwargs"]["rng_key"] = numpyro.prng_key()


class _InScan(_Inside):
    """The same inside of `scan`, where sites are marked and no parameters may be."""

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "sample":
            msg["infer"] = {**msg["infer"], _IN_SCAN: True}
        elif msg["type"] == "param":
            raise ValueError(
                f"Parameter '{msg['name']}' is declared inside of `scan`, where NumPyro neither finds nor fits it. "
                f"Call numpyro.param('{msg['name']}', …) before `scan`, and use its value inside."
            )
        super().process_message(msg)
