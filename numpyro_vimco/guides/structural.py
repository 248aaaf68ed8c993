# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""The base class of this package's automatic guides: the structure of a model, found at the first call."""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from numpyro.distributions import constraints
from numpyro.distributions.constraints import Constraint
from numpyro.handlers import block, seed, substitute, trace
from numpyro.infer import init_to_uniform
from numpyro.primitives import Messenger

from numpyro_vimco.arguments import listed
from numpyro_vimco.compilation import ONCE, Compiled, at_once
from numpyro_vimco.control_flow import Given, Scans
from numpyro_vimco.families.bounds import (
    Moving,
    covering,
    has_total,
    is_of_integers,
    moving_supports,
    supports_of,
    total_of,
)
from numpyro_vimco.families.couplings import Graph, draws_anywhere, local_plates, log_densities
from numpyro_vimco.families.families import moving_support_error
from numpyro_vimco.families.supports import check_draws, check_has_support
from numpyro_vimco.families.units import prior_draws
from numpyro_vimco.guides.automatic import set_up
from numpyro_vimco.guides.least import Data, least_values, near_data
from numpyro_vimco.guides.plan import autoregressive, gated, steps_of
from numpyro_vimco.guides.structured import FromParams, InGuide, Sampler, Samples, Site
from numpyro_vimco.private.of_numpyro import PrototypeGuide
from numpyro_vimco.randomness import split, split_by_name
from numpyro_vimco.sites import Trace, base_support, is_count, is_discrete, is_latent_site, is_marked, without_plates


class WithoutMarked(Messenger):
    """A model whose marked sites (``infer={"enumerate": "parallel"}``) no handler sees, as an objective sums them out.

    They have a draw from their prior, the same at each call.

    :ivar hidden: names of these sites, as far as they were met.
    """

    def __init__(self, fn: Callable):
        super().__init__(fn)
        self.hidden: set[str] = set()

    def __enter__(self):
        self._key = jax.random.key(0)
        return super().__enter__()

    def __exit__(self, *args) -> None:
        del self._key  # it may be traced
        super().__exit__(*args)

    def process_message(self, msg: dict) -> None:
        if is_latent_site(msg):
            check_has_support(msg)  # before NumPyro's functions for where to begin, which fail without one
        if msg["type"] == "sample" and is_marked(msg):
            self.hidden.add(msg["name"])
            msg["stop"] = True
            if msg["value"] is None and msg["kwargs"]["rng_key"] is None:
                self._key, msg["kwargs"]["rng_key"] = split(self._key)


class StructuralGuide(PrototypeGuide):
    """An automatic guide that knows the sites and plates of a model; marked sites are left out.

    It never evaluates the model's density with discrete sites summed out, as the guides of NumPyro do at their first
    call. What it finds out at its own first call holds no tracers of JAX.
    """

    def __init__(self, model: Callable, chains: Collection[str] = (), **kwargs):
        super().__init__(WithoutMarked(model), **kwargs)
        self.chains = frozenset([chains] if isinstance(chains, str) else chains)
        self._set_unknown()

    def _set_unknown(self) -> None:
        self.homes: dict[str, str] = {}
        self.plates_in_scan = False  # of latents that are in no chain
        # Supports that depend on latents; and of discrete latents the supports to propose from, draws of priors that
        # are ones given other latents, the least values of counts in chains that the data admit, and values above the
        # least where other counts begin.
        self.moving: dict[str, Moving] = {}
        self.covers: dict[str, Constraint] = {}
        self.prior_draws: Samples = {}
        self.least: dict[str, np.ndarray] = {}
        self.above_least: dict[str, np.ndarray] = {}

    @contextmanager
    def _known_structure(self, args: tuple, kwargs: dict) -> Iterator[None]:
        """A context in which the structure of the model is known.

        It is found out at the first call, and kept, unless it depends on arguments that JAX traces.

        :raises ValueError: if it has to be found out, and the call has no arguments.
        """
        if self.prototype_trace is None and self._was_traced and not (args or kwargs):
            raise ValueError(
                "The guide was called under a transformation of JAX that traced its arguments, and keeps nothing that "
                "depends on them. Pass the model's arguments, `guide.sample_posterior(rng_key, params, *args)`, or "
                "call `svi.init(rng_key, *args)` once outside of `jax.jit` and `jax.vmap`."
            )
        set_up(self, *args, **kwargs)
        yield
        if self._holds_tracers():
            self._forget()

    def _holds_tracers(self) -> bool:
        found = [(site["value"], site.get("fn")) for site in self.prototype_trace.values()], self._prototype_arguments
        return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(found))

    def _forget(self) -> None:
        """Drop the structure that this call has found out."""
        self.prototype_trace = self._prototype_arguments = None
        self._set_unknown()
        self._was_traced = True

    def _find_homes(self, scans: dict[str, int]) -> None:
        """Find the chain that each latent is in.

        :raises ValueError: for a chain that no `scan` draws.
        """
        latents = [name for name, site in self.prototype_trace.items() if is_latent_site(site) and name in scans]
        self.homes = {}
        for chain in sorted(self.chains):
            if not latents:
                raise ValueError(
                    f"`chains` names '{chain}', but the model draws no latent inside of `scan`. Leave it out, or write "
                    "the series as a `numpyro.contrib.control_flow.scan`."
                )
            if chain not in latents:
                raise ValueError(
                    f"`chains` names '{chain}', but the latents that the model draws inside of `scan` are "
                    f"{listed(latents)}. Name one latent of each chain."
                )
            self.homes |= {name: chain for name in latents if scans[name] == scans[chain]}

    def _trace_structure(self, rng_key: Array, *args, **kwargs) -> None:
        """Find the sites and plates, with latents where ``init_loc_fn`` has values for them.

        :raises ValueError: for a value of another shape than its site, or inside of `scan` than its series.
        """
        begun: set[str] = set()
        series: Samples = {}

        def init(site: dict) -> Array | None:
            value = self.init_loc_fn(site)
            if value is None or not is_latent_site(site):
                return value
            begun.add(site["name"])
            try:
                return jnp.broadcast_to(jnp.asarray(value), site["fn"].shape(site["kwargs"]["sample_shape"]))
            except ValueError:
                series[site["name"]] = value  # as it is: an array that is made inside of `scan` is traced
                return None

        model = scans = Scans(substitute(seed(self.model, rng_key), substitute_fn=init))

        def structure() -> Trace:
            tr = trace(model).get_trace(*args, **kwargs)
            given = {name: jnp.asarray(value) for name, value in series.items()}
            for name, value in given.items():
                if jnp.shape(value) != jnp.shape(tr[name]["value"]):
                    raise ValueError(
                        f"`init_loc_fn` gives site '{name}' a value of shape {jnp.shape(value)}, but its shape is "
                        f"{jnp.shape(tr[name]['value'])}. Pass one value for each element, or one for all; inside of "
                        "`scan` the first dimension is time."
                    )
            return trace(Given(model, given)).get_trace(*args, **kwargs) if given else tr

        with block():
            self.prototype_trace = at_once(structure)
        self._find_homes(scans.found)
        sites = self.prototype_trace.values()
        for site in filter(is_latent_site, sites):
            check_draws(site)
        full_sizes = {site["name"]: site["args"][0] for site in sites if site["type"] == "plate"}
        vectors = []
        for name in scans.found.keys() & self.prototype_trace.keys():
            site = self.prototype_trace[name]
            for frame in site["cond_indep_stack"]:
                # A plate that is inside only is whole: no trace of the model has one that is not.
                if full_sizes.setdefault(frame.name, frame.size) != frame.size and is_latent_site(site):
                    raise ValueError(
                        f"The latent site '{name}' is inside of `scan` in the plate '{frame.name}', which is "
                        "subsampled: automatic guides draw all elements of a series. Do not subsample this plate, or "
                        "write a guide by hand for these sites."
                    )
            if is_latent_site(site) and site["cond_indep_stack"] and name not in self.homes:
                vectors.append(name)  # data keep their plates, by which elements are independent
        self.plates_in_scan = bool(vectors)
        self.prototype_trace = without_plates(self.prototype_trace, vectors)
        latents = filter(is_latent_site, self.prototype_trace.values())
        frames = [frame for site in latents for frame in site["cond_indep_stack"]]
        self._set_frames({frame.name: frame for frame in frames}, full_sizes)
        self._prototype_arguments, self.begun = (args, kwargs), frozenset(begun)
        self._find_supports(*args, **kwargs)

    def _find_supports(self, *args, **kwargs) -> None:
        """Find supports that depend on latents, and those to propose from.

        :raises ValueError: for a support that the guide can neither see nor cover.
        """
        latents = {name: site["value"] for name, site in self.prototype_trace.items() if is_latent_site(site)}
        discrete = [name for name in latents if is_discrete(self.prototype_trace[name])]
        self.covers = {name: self.prototype_trace[name]["fn"].support for name in discrete}
        supports = supports_of(self.model, args, kwargs)
        self.moving = moving_supports(supports, latents)
        known = self.homes.keys() | self.moving.keys() | self.begun
        if counts := [name for name in discrete if is_count(self.covers[name]) and name not in known]:
            self._begin_above_least(Data.of(self.model, args, kwargs, self.prototype_trace), counts)
        for name in self.moving:
            is_needed = name not in discrete or has_total(self.covers[name])
            if is_needed and (why := self._unseen(name)):
                raise moving_support_error(self.prototype_trace[name], why)
        named = [name for name in discrete if name in self.homes or name in self.moving]
        named = [name for name in named if is_of_integers(self.covers[name])]
        totals = [name for name in discrete if has_total(self.covers[name])]
        self.covers |= dict.fromkeys(totals, constraints.integer_greater_than(0))
        named += totals
        if not named:
            return
        draws = prior_draws(self.model, args, kwargs, latents)
        self.prior_draws = {name: draws[name] for name in named}
        if totals:  # to which draws of NumPyro (0.22) do not always add up
            total = lambda site: jnp.broadcast_to(total_of(site["fn"].support), site["fn"].batch_shape)  # noqa: E731
            sums = prior_draws(self.model, args, kwargs, totals, total)
            for name in totals:
                share = sums[name] / jnp.maximum(draws[name].sum(-1), 1)
                self.prior_draws[name] = jnp.round(draws[name] * share[..., None]).astype(draws[name].dtype)
        self._cover([name for name in named if name in self.moving and name not in totals], supports, latents)
        if inside := {name: self.prior_draws[name] for name in named if name in self.homes}:
            data = Data.of(self.model, args, kwargs, self.prototype_trace)
            self.least = least_values(data, inside)
            self.prior_draws |= near_data(data, self.homes, draws)
        self.covers |= {name: constraints.integer_greater_than(least) for name, least in self.least.items()}

    def _begin_above_least(self, data: Data, names: Iterable[str]) -> None:
        """Let counts begin above the least that the data admit."""
        sites = [self.prototype_trace[name] for name in names]
        values = {site["name"]: site["value"][None] for site in sites if self._subsampled(site) is None}
        for name, least in least_values(data, values).items():
            site, low = self.prototype_trace[name], base_support(self.covers[name]).lower_bound
            self.above_least[name] = np.where(least > low, least + 1, low)
            site["value"] = jnp.maximum(site["value"], self.above_least[name].astype(site["value"].dtype))

    def _cover(self, left: list[str], supports: Callable[[Samples], dict[str, Constraint]], latents: Samples) -> None:
        """Cover the values of integers whose support depends on latents, after those of these latents.

        :raises ValueError: where a smallest value is neither seen nor known.
        """
        while left:
            # Those of circles cover each other's values last.
            name = next((x for x in left if not self.moving[x].parents & (set(left) - {x})), left[0])
            left.remove(name)
            others = {other: support for other, support in self.covers.items() if other not in {name, *left}}
            moving, support = self.moving[name], self.covers[name]
            cover = covering(name, support, moving, supports, latents, others, self.prior_draws)
            is_sure = isinstance(cover, constraints.integer_interval) or not moving.has_moving_low
            if not is_sure and (why := self._unseen(name)):
                raise moving_support_error(self.prototype_trace[name], why)
            self.covers[name] = cover

    def _couple(self, sites: list[Site], *args, **kwargs) -> list[Site]:
        """Sites in the order in which an autoregressive guide draws them, each with the sites it is coupled to."""
        values = {site["name"]: site["value"] for site in self.prototype_trace.values() if is_latent_site(site)}

        def others() -> Samples:
            elsewhere = substitute(seed(self.model, jax.random.key(1)), substitute_fn=init_to_uniform)
            with block():
                tr = trace(elsewhere).get_trace(*args, **kwargs)
            return {name: tr[name]["value"] for name in values}

        evaluate = log_densities(self.model, args, kwargs)
        graph = Graph.of(evaluate, values)
        local = local_plates(graph, self.prototype_trace, evaluate, draws_anywhere(self.model, args, kwargs, values))
        local |= {steps_of(chain) for chain in self.chains}
        seen = {name: moving.parents for name, moving in self.moving.items() if not self._unseen(name)}
        ordered = autoregressive(sites, graph, local, seen)
        return gated(ordered, Compiled(evaluate, ONCE), values, partial(at_once, others))

    def _unseen(self, name: str) -> str | None:
        """Why the guide does not draw a site after all those that its support depends on; None if it does."""
        if name in self.homes:
            return "the steps of a chain are drawn independently"
        if self.structure != "autoregressive":
            return f"structure='{self.structure}' draws it independently"
        reached: set[str] = set()
        todo = [name]
        while todo:
            moving = self.moving.get(todo.pop())
            todo += (moving.parents if moving else frozenset()) - reached
            reached |= set(todo)
        if name in reached:
            return "the site's own values at other times are among them"
        for site in (name, *self.moving[name].parents):
            if plate := self._subsampled(self.prototype_trace[site]):
                return f"the plate '{plate}' is subsampled"
        return None

    def _subsampled(self, site: dict) -> str | None:
        """A plate of a site that is subsampled."""
        frames = site["cond_indep_stack"]
        return next((f.name for f in frames if f.size != self._full_plate_size(f.name)), None)

    def _check_marginals(self, sites: Iterable[Site]) -> None:
        """Raise unless all sites are independent.

        :raises NotImplementedError: naming one that depends on others.
        """
        for site in sites:
            if site.depends:
                raise NotImplementedError(
                    f"With structure='{self.structure}' the marginal of '{site.name}' is a mixture, and has no closed "
                    "quantiles. Use those of `sample_posterior(rng_key, params, sample_shape=(10_000,))`."
                )

    def _draw_in_guide(self, sampler: Sampler, *args, **kwargs) -> Samples:
        return sampler.run(InGuide(self._plates_of_call(*args, **kwargs), self.homes))

    def _draw_at_params(self, sampler: Sampler, rng_key: Array, params: Samples, sample_shape: tuple) -> Samples:
        def draw(rng_key: Array) -> Samples:
            return sampler.run(FromParams(params, split_by_name(rng_key, [site.name for site in sampler.sites])))

        for _ in sample_shape:
            draw = jax.vmap(draw)
        return draw(split(rng_key, sample_shape) if sample_shape else rng_key)

    def _support_at(self, args: tuple, kwargs: dict) -> Callable[[str, Samples], Constraint]:
        """A function from a site, and the values of those that its support depends on, to its support."""
        if not args and not kwargs:
            args, kwargs = self._prototype_arguments
        values = {name: site["value"] for name, site in self.prototype_trace.items() if is_latent_site(site)}
        supports = supports_of(self.model, args, kwargs)
        return lambda name, given: supports({**values, **given})[name]

    def _with_deterministic(self, rng_key, params, samples, sample_shape, args, kwargs) -> dict[str, Array]:
        """Samples, and the deterministic sites that follow from them if they are all the latents."""
        sites = self.prototype_trace.values()
        names = [site["name"] for site in sites if site["type"] == "deterministic"]
        # Deterministic sites may depend on sites that are summed out, of which there is no draw here.
        if (
            not names
            or self.model.hidden
            or any(is_latent_site(site) and site["name"] not in samples for site in sites)
        ):
            return samples
        if not args and not kwargs:
            args, kwargs = self._prototype_arguments

        def follow(rng_key: Array, latents: Samples) -> Samples:
            model = Given(substitute(seed(self.model, rng_key), data=params), latents)
            with block():
                tr = trace(model).get_trace(*args, **kwargs)
            return {name: tr[name]["value"] for name in names}

        for _ in sample_shape:
            follow = jax.vmap(follow)
        return {**samples, **follow(split(rng_key, sample_shape) if sample_shape else rng_key, samples)}
