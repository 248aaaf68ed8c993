# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

r"""Chains: the latents that one `scan` draws at each of its T steps, each step given the one before it.

A particle has K samples of each step, drawn by a guide whose steps are independent given what is shared. All
:math:`K^T` paths through them count. So the log-weight of a chain is a table with an entry for each sample k of step t
and each sample l of the step before it, :math:`\log p(z_t^k, x_t \mid z_{t-1}^l) - \log q_t(z_t^k)`.

Here the body of the `scan` is run once, in place, for one entry of the table (:class:`InStep`); `vmap` makes the
others. The carry that it is given is what the body returns at sample l of the step before. Parts of a carry that depend
on no latent, such as a counter, are scanned as they are. Other parts must depend on the latents of their own step only,
which the body's jaxpr shows (:func:`find_chains`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpyro.distributions as dist
from numpyro.handlers import block, seed, trace
from numpyro.primitives import Messenger

from numpyro_vimco.checks.chains import (
    carry_error,
    same_chain_error,
    summed_carry_error,
    unknown_chain_error,
)
from numpyro_vimco.control_flow import Given, is_scan, length_of
from numpyro_vimco.densities.levels import Step, Values
from numpyro_vimco.dependence import dependence
from numpyro_vimco.private.of_numpyro import scanned, with_given_data
from numpyro_vimco.randomness import CHAIN
from numpyro_vimco.sites import Trace, is_latent_site, is_marked, log_prob_at_value, sample_sites


@dataclass(frozen=True)
class Chain:
    """A chain of a model.

    :ivar num_samples: K.
    :ivar latents: its latents that the guide samples.
    :ivar sites: all sample sites of one step.
    :ivar plates: names of the plates of these.
    :ivar length: T.
    :ivar reverse: whether the `scan` begins at the end.
    :ivar moving: for each leaf of the carry, whether it depends on latents.
    """

    num_samples: int
    latents: tuple[str, ...]
    sites: frozenset[str]
    plates: frozenset[str]
    length: int
    reverse: bool
    moving: tuple[bool, ...]

    def shifted(self, values: Values) -> Values:
        """For each step, the values of the step before it; any at the first.

        :param values: arrays of shape ``(samples, T, ...)``.
        """
        return {name: jnp.roll(value, -1 if self.reverse else 1, axis=1) for name, value in values.items()}


Chains = Mapping[str, Chain]


class OneStep(dist.Independent):
    """The distribution of one step in a guide whose log-density is known.

    It is an ``Independent`` without a dimension, so that whatever looks through wrappers looks through it.
    """

    pytree_data_fields = ("known",)

    def __init__(self, base_dist: dist.Distribution, known: Array):
        self.known = known
        super().__init__(base_dist, 0)
        self._batch_shape = jnp.shape(known)

    def log_prob(self, value):
        return self.known


def at_step(guide_trace: Trace, chains: Chains, steps: Mapping[str, Step], which: int = 0) -> Trace:
    """A guide's trace with the sites of chains at one step.

    :param which: of the log-densities of a step.
    """
    found = dict(guide_trace)
    for name, step in steps.items():
        for latent in chains[name].latents:
            site = guide_trace[latent]
            found[latent] = {
                **site,
                "fn": OneStep(site["fn"], step.log_q[which][latent]),
                "value": step.own[latent],
                "cond_indep_stack": [f for f in site["cond_indep_stack"] if f.name in chains[name].plates],
                "infer": {CHAIN: name},
            }
    return found


def of_steps(guide_trace: Trace, chain: Chain) -> tuple[Values, Values]:
    """The values of a chain's latents in a guide, and their log-densities, each with a first dimension for time."""
    sites = [guide_trace[latent] for latent in chain.latents]
    values = {site["name"]: site["value"] for site in sites}
    return values, {site["name"]: log_prob_at_value(site) for site in sites}


class Marked(Messenger):
    """Marks the sites of chains, and each `scan` that draws latents of one."""

    def __init__(self, fn: Callable, chains: Chains):
        super().__init__(fn)
        self.home = {site: name for name, chain in chains.items() for site in chain.sites}

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "sample" and msg["name"] in self.home:
            msg["infer"] = {**msg["infer"], CHAIN: self.home[msg["name"]]}
        elif is_scan(msg):
            names = [name for name in _body_trace(msg) if name in self.home]
            msg["infer"] = {CHAIN: self.home[names[0]]} if names else {}


def numbers(plate_particles: Mapping[str, int], chains: Chains) -> dict[str, int]:
    """Of each named plate and each chain, the number of its local particles, or of its samples of a step."""
    return {**plate_particles, **{name: chain.num_samples for name, chain in chains.items()}}


def marked(program: Callable, chains: Chains) -> Callable:
    """A program whose sites in chains are marked."""
    return Marked(program, chains) if chains else program


class InStep(Messenger):
    """A model, marked, whose chains are run in place at one entry of their tables.

    What follows a `scan` must not depend on its results: they are of this step alone.
    """

    def __init__(self, fn: Callable, chains: Chains, steps: Mapping[str, Step]):
        super().__init__(fn)
        self.chains, self.steps = chains, steps
        self._index: tuple[Array, int] | None = None

    def process_message(self, msg: dict) -> None:
        # A scan inside of a step runs as it is.
        if is_scan(msg) and msg.get("infer", {}).get(CHAIN) in self.steps and self._index is None:
            name = msg["infer"][CHAIN]
            msg["value"] = self._run(msg, self.chains[name], self.steps[name])
        elif msg["type"] == "sample" and self._index is not None and msg["value"] is not None:
            # Data that `condition` gives are of all steps.
            index, length = self._index
            if jnp.ndim(msg["value"]) > len(msg["fn"].shape()) and jnp.shape(msg["value"])[0] == length:
                msg["value"] = jnp.asarray(msg["value"])[index]

    def _run(self, msg: dict, chain: Chain, step: Step) -> tuple:
        body, init, xs, _, reverse = msg["args"]
        xs = jax.tree.map(jnp.asarray, xs)
        leaves: list = jax.tree.leaves(init)
        structure: Any = jax.tree.structure(init)

        def carry_of(moving: list, still: list) -> Any:
            iterators = {True: iter(moving), False: iter(still)}
            return structure.unflatten([next(iterators[is_moving]) for is_moving in chain.moving])

        def after(still: list, index: Array, values: Values) -> tuple[list, list]:
            """The parts of the carry after a step."""
            given = with_given_data(Given(body, values), msg, index, chain.length)
            with block():
                carry, _ = seed(given, jax.random.key(0))(carry_of(first, still), _taken(xs, index))
            return _parted(jax.tree.leaves(carry), chain.moving)

        first, still = _parted([jnp.asarray(leaf) for leaf in leaves], chain.moving)
        at_all = last = still
        if still:
            like = jax.eval_shape(lambda: after(still, jnp.array(0), _taken(step.path, 0))[1])
            still = [x.astype(other.dtype) for x, other in zip(still, like)]

            def advance(still: list, index: Array) -> tuple[list, list]:
                return after(still, index, _taken(step.path, index))[1], still

            last, at_all = jax.lax.scan(advance, still, jnp.arange(chain.length), reverse=reverse)
        index = step.time
        before = jnp.clip(index + (1 if reverse else -1), 0, chain.length - 1)
        is_first = index == (chain.length - 1 if reverse else 0)
        moving, _ = after(_taken(at_all, before), before, step.before)
        moving = [jnp.where(is_first, x, other) for x, other in zip(first, moving)]
        self._index = index, chain.length
        try:
            carry, y = body(carry_of(moving, _taken(at_all, index)), _taken(xs, index))
        finally:
            self._index = None
        moving, _ = _parted(jax.tree.leaves(carry), chain.moving)
        ys = jax.tree.map(lambda x: jnp.broadcast_to(x, (chain.length, *jnp.shape(x))), y)
        return scanned(carry_of(moving, last), ys)


def find_chains(
    model: Callable, guide: Callable, args: tuple, kwargs: dict, chain_particles: Mapping[str, int]
) -> Chains:
    """The chains of a model that ``chain_particles`` names, found without computing anything.

    :raises ValueError: for a name that no `scan` draws, two names of one chain, and a carry that depends on latents
        before its own step or on summed ones.
    """
    if not chain_particles:
        return {}
    found: dict[str, Chain] = {}

    def look() -> None:
        sampled = {
            site["name"]
            for site in sample_sites(_traced(seed(guide, jax.random.key(0)), args, kwargs))
            if is_latent_site(site)
        }
        finder = _Finder(seed(model, jax.random.key(0)), chain_particles, sampled)
        tr = _traced(finder, args, kwargs)
        for name in chain_particles:
            if name not in finder.found:
                known = [latent for chain in finder.all for latent in chain]
                in_loop = name in tr and is_latent_site(tr[name])
                raise unknown_chain_error(name, known, in_loop)
        found.update({name: finder.found[name] for name in chain_particles})

    jax.eval_shape(look)
    return found


class _Finder(Messenger):
    """Finds chains in a model.

    :ivar all: latents of each `scan`.
    """

    def __init__(self, fn: Callable, chain_particles: Mapping[str, int], sampled: set[str]):
        super().__init__(fn)
        self.chain_particles, self.sampled = chain_particles, sampled
        self.found: dict[str, Chain] = {}
        self.all: list[list[str]] = []

    def process_message(self, msg: dict) -> None:
        if not is_scan(msg):
            return
        sites = sample_sites(_body_trace(msg))
        latents = tuple(site["name"] for site in sites if is_latent_site(site) and site["name"] in self.sampled)
        summed = [site["name"] for site in sites if is_marked(site) and site["name"] not in self.sampled]
        self.all.append(list(latents))
        names = [name for name in self.chain_particles if name in latents]
        if not names:
            return
        if len(names) > 1:
            raise same_chain_error(*names[:2])
        _, _, xs, length, reverse = msg["args"]
        self.found[names[0]] = Chain(
            num_samples=self.chain_particles[names[0]],
            latents=latents,
            sites=frozenset(site["name"] for site in sites),
            plates=frozenset(frame.name for site in sites for frame in site["cond_indep_stack"]),
            length=length_of(xs, length),
            reverse=reverse,
            moving=_moving(msg, names[0], sites, summed),
        )


def _moving(msg: dict, name: str, sites: list[dict], summed: list[str]) -> tuple[bool, ...]:
    """For each leaf of the carry of a `scan`, whether it depends on latents.

    :raises ValueError: for a leaf that depends on latents before its own step, or on summed ones.
    """
    init = msg["args"][1]
    paths, _ = jax.tree_util.tree_flatten_with_path(init)
    structure: Any = jax.tree.structure(init)
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    latents = {site["name"]: site["value"] for site in sites if is_latent_site(site)}

    def after(inputs: dict) -> dict:
        carry = structure.unflatten([inputs["carry", i] for i in range(len(names))])
        values = {latent: inputs["latent", latent] for latent in latents}
        carry, _ = _run_body(msg, lambda body: Given(body, values), carry)
        return dict(enumerate(jax.tree.leaves(carry)))

    inputs: dict = {("carry", i): jnp.asarray(leaf) for i, (_, leaf) in enumerate(paths)}
    inputs |= {("latent", latent): value for latent, value in latents.items()}
    parents: dict = dependence(after, inputs)
    moving = {i for i in parents if any(kind == "latent" for kind, _ in parents[i])}
    while more := {i for i in parents if any(("carry", j) in parents[i] for j in moving)} - moving:
        moving |= more
    for i in sorted(moving):
        for latent in summed:
            if ("latent", latent) in parents[i]:
                raise summed_carry_error(name, names[i], latent)
        for j in sorted(moving):
            if ("carry", j) in parents[i]:
                raise carry_error(name, names[i], names[j])
    return tuple(i in moving for i in range(len(names)))


def _body_trace(msg: dict) -> Trace:
    """The sites of one step of a `scan`, from shapes only."""
    recorder = trace(msg["args"][0])

    def look() -> None:
        _run_body(msg, lambda body: recorder, msg["args"][1])

    jax.eval_shape(look)
    return dict(recorder.trace)


def _run_body(msg: dict, wrapped: Callable[[Callable], Callable], carry: Any) -> tuple[Any, Any]:
    """The first step of a `scan`, which no handler around it sees."""
    body, _, xs, length, _ = msg["args"]
    given = with_given_data(wrapped(body), msg, jnp.array(0), length_of(xs, length))
    with block():
        return seed(given, jax.random.key(0))(carry, _taken(jax.tree.map(jnp.asarray, xs), 0))


def _traced(program: Callable, args: tuple, kwargs: dict) -> Trace:
    with block():
        return trace(program).get_trace(*args, **kwargs)


def _taken(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


def _parted(leaves: list, moving: tuple[bool, ...]) -> tuple[list, list]:
    """The leaves that move, and the others."""
    return tuple([leaf for leaf, is_moving in zip(leaves, moving) if is_moving is which] for which in (True, False))  # type: ignore[return-value]
