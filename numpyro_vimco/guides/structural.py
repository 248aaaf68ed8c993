# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""What automatic guides have in common: a trace of the model for its structure, and nothing of JAX's tracers."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import jax
from jaxtyping import Array
from numpyro.handlers import block, seed, substitute, trace
from numpyro.infer import Predictive

from numpyro_vimco.dependence import dependence
from numpyro_vimco.guides.private import PrototypeGuide, set_up
from numpyro_vimco.sites import is_latent_site


class StructuralGuide(PrototypeGuide):
    """An automatic guide that knows the structure of a model, but not its density, from which NumPyro sums discrete
    sites out.
    """

    @contextmanager
    def _known_structure(self, args: tuple, kwargs: dict) -> Iterator[None]:
        """What the first call finds out, here and afterwards; not afterwards, where it depends on what JAX traces.

        :raises ValueError: if it has to be found out without arguments.
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
        """Drop what the first call has found out."""
        self.prototype_trace = self._prototype_arguments = None
        self._was_traced = True

    def _trace_structure(self, model: Callable, *args, **kwargs) -> None:
        with block():
            self.prototype_trace = trace(model).get_trace(*args, **kwargs)
        sites = self.prototype_trace.values()
        frames = [frame for site in sites if is_latent_site(site) for frame in site["cond_indep_stack"]]
        full_sizes = {site["name"]: site["args"][0] for site in sites if site["type"] == "plate"}
        for frame in frames:
            if frame.name not in full_sizes:
                # NumPyro's automatic guides do not reach it either.
                raise ValueError(
                    f"Latent sites are in the plate '{frame.name}' inside of `scan`, which automatic guides cannot "
                    "reach. Move the plate outside of `scan`, or write a guide by hand for these sites."
                )
        self._set_frames({frame.name: frame for frame in frames}, full_sizes)
        self._prototype_arguments = args, kwargs

    def _moving_supports(self, names: Iterable[str], latents: dict[str, Array], *args, **kwargs) -> list[str]:
        """The sites whose support depends on latents."""

        def supports(latents):
            with block():
                tr = trace(substitute(seed(self.model, 0), data=latents)).get_trace(*args, **kwargs)
            return {name: jax.tree.leaves(tr[name]["fn"].support) for name in names}

        return [name for name, found in dependence(supports, latents).items() if found]

    def _with_deterministic(self, rng_key, params, samples, sample_shape, args, kwargs) -> dict[str, Array]:
        """Samples, and the deterministic sites that follow from them if they are all the latents."""
        sites = self.prototype_trace.values()
        names = [site["name"] for site in sites if site["type"] == "deterministic"]
        if not names or any(is_latent_site(site) and site["name"] not in samples for site in sites):
            return samples
        if not args and not kwargs:
            args, kwargs = self._prototype_arguments
        predict = Predictive(
            substitute(self.model, params), samples, return_sites=names, batch_ndims=len(sample_shape), parallel=True
        )
        return {**samples, **predict(rng_key, *args, **kwargs)}
