# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Of NumPyro: automatic guides, a mask, `scan`, what mixtures and optimisers have in common. Seen in 0.20 and in 0.22.

Of ``AutoGuide``: ``_setup_prototype``, which the first call runs; ``_prototype_frames``, the plates of latents;
``_prototype_frame_full_sizes``; ``_create_plates``. Of ``AutoNormal``: ``_init_locs``, where its sites begin in
unconstrained space, of the full plates' sizes; ``_event_dims``, their event dimensions there; ``_init_scale``. Of
``AutoContinuous``: ``_unpack_latent``, from its auxiliary site to the latents.
"""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpyro
from numpyro.contrib.control_flow.scan import PytreeTrace, _subs_wrapper
from numpyro.distributions import Distribution, MaskedDistribution
from numpyro.distributions.mixtures import _MixtureBase
from numpyro.distributions.util import periodic_repeat
from numpyro.handlers import condition, substitute
from numpyro.infer.autoguide import AutoContinuous, AutoGuide, AutoNormal
from numpyro.optim import _NumPyroOptim
from numpyro.primitives import CondIndepStackFrame

PARTS = (
    "numpyro.infer.autoguide.AutoGuide._setup_prototype",
    "numpyro.infer.autoguide.AutoGuide._create_plates",
    "numpyro.contrib.control_flow.scan._subs_wrapper",
    "numpyro.distributions.mixtures._MixtureBase",
    "numpyro.optim._NumPyroOptim",
)
# What a first call of AutoNormal, and of AutoMultivariateNormal, leaves behind.
OF_AUTO_NORMAL = "_prototype_frames", "_prototype_frame_full_sizes", "_init_locs", "_event_dims", "_init_scale"
OF_JOINT_GUIDE = "_init_locs", "_unpack_latent"

Mixture, Optimizer = _MixtureBase, _NumPyroOptim


class PrototypeGuide(AutoGuide):
    """An automatic guide with a prototype of its own, and access to its plates.

    :ivar begun: names of the latents that begin where ``init_loc_fn`` said.
    """

    prototype_trace: Any

    def __init__(self, model: Callable, **kwargs):
        super().__init__(model, **kwargs)
        self._prototype_arguments: Any = None
        self.begun: frozenset[str] = frozenset()
        self._was_traced = False

    def _set_frames(self, frames: dict[str, CondIndepStackFrame], full_sizes: dict[str, int]) -> None:
        """Keep the plates of latents, and the full sizes of all plates."""
        self._prototype_frames, self._prototype_frame_full_sizes = frames, full_sizes

    def take_structure(self, other: "PrototypeGuide") -> None:
        """Have the prototype and the plates of another guide of the same model."""
        self.prototype_trace, self.begun = other.prototype_trace, other.begun
        self._prototype_arguments = other._prototype_arguments
        self._set_frames(other._prototype_frames, other._prototype_frame_full_sizes)

    def _full_plate_size(self, plate: str) -> int:
        return self._prototype_frame_full_sizes[plate]

    def _full_size(self, site: dict, value: Array, event_dim: int) -> Array:
        """Repeat the values of a subsample for the whole plate.

        :param event_dim: number of dimensions of ``value`` after those of the plates.
        """
        for frame in site["cond_indep_stack"]:
            size = self._full_plate_size(frame.name)
            if size != frame.size:
                value = periodic_repeat(value, size, frame.dim - event_dim)
        return value

    def _plates_of_call(self, *args, **kwargs) -> dict[str, numpyro.plate]:
        """The plates of latents in this call, by name."""
        return self._create_plates(*args, **kwargs)


def setup_prototype(guide: AutoGuide, *args, **kwargs) -> None:
    """What the first call of a guide does before it samples."""
    # NumPyro's initialization functions promote ranks where its objectives do not.
    with jax.numpy_rank_promotion("allow"):
        guide._setup_prototype(*args, **kwargs)


def without_tracers(guide: AutoGuide) -> None:
    """Make locations concrete: under `jax.vmap` a `custom_jvp` returns a tracer even for values that are not traced."""
    guide._init_locs = jax.tree.map(jnp.copy, getattr(guide, "_init_locs", {}))


def init_locs(guide: AutoNormal) -> dict[str, Array]:
    """Where a guide begins, in unconstrained space."""
    return guide._init_locs


def unconstrained_event_dim(guide: AutoNormal, name: str) -> int:
    """Event dimensions of a site in unconstrained space."""
    return guide._event_dims[name]


def init_scale(guide: AutoNormal) -> float:
    """The scale that a guide begins with."""
    return guide._init_scale


def latents_of(guide: AutoContinuous) -> list[str]:
    """Names of the latents that a guide of NumPyro draws jointly."""
    return list(guide._init_locs)


def packed(guide: AutoContinuous, unconstrained: dict[str, Array]) -> Array:
    """The value of its auxiliary site that gives these latents, in unconstrained space."""
    return guide._unpack_latent.pack_fn(unconstrained, guide._unpack_latent.unpack_fn.keywords["shape_dict"])


def own_mask(fn: MaskedDistribution) -> Any:
    """The mask of a masked distribution: an array or a bool, of the batch shape."""
    return fn._mask


def without_validation(fn: Distribution) -> Distribution:
    """A distribution whose density does not compare values with its support."""
    other = copy(fn)
    other._validate_args = False
    parts = {name: part for name, part in vars(fn).items() if isinstance(part, Distribution)}
    vars(other).update({name: without_validation(part) for name, part in parts.items()})
    return other


def with_given_data(body: Callable, msg: dict, index: Array, length: int) -> Callable:
    """The body of a `scan` at one step, with what `condition` and `substitute` inside of a program give it.

    :param msg: NumPyro's message of the `scan`.
    """
    for kind, data in msg["kwargs"]["substitute_stack"]:
        of_step = partial(_subs_wrapper, data, index, length)
        if kind == "condition":
            body = condition(body, condition_fn=of_step)
        elif kind == "substitute":
            body = substitute(body, substitute_fn=of_step)
    return body


def scanned(carry: Any, ys: Any) -> tuple:
    """What NumPyro's `scan` takes as computed: no sites are left to be shown to handlers."""
    return (None, None, carry), (PytreeTrace({}), ys)
