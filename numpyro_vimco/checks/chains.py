# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Errors of programs that are no chains: see :mod:`numpyro_vimco.densities.chains`."""

from collections.abc import Collection

from numpyro_vimco.arguments import listed


def unknown_chain_error(name: str, known: Collection[str], in_loop: bool) -> ValueError:
    """A name that is no latent inside of `scan`."""
    if in_loop:
        return ValueError(
            f"`chain_particles` names '{name}', which is a latent outside of `scan`. A chain has a latent at each step "
            "of `numpyro.contrib.control_flow.scan`: write the loop as a scan whose body draws it. Latents inside of "
            f"`scan`: {listed(known)}."
        )
    if not known:
        return ValueError(
            f"`chain_particles` names '{name}', but the guide samples no latent inside of `scan`. Leave it out, or "
            "write the series as a `numpyro.contrib.control_flow.scan`."
        )
    return ValueError(
        f"`chain_particles` names '{name}', but the latents that the guide samples inside of `scan` are "
        f"{listed(known)}. Name one of these, without the number of the step."
    )


def same_chain_error(first: str, second: str) -> ValueError:
    """Two names of one chain."""
    return ValueError(
        f"`chain_particles` names '{first}' and '{second}', which one `scan` draws at each step: they are one chain, "
        "and are drawn together. Name one of them."
    )


def carry_error(chain: str, carry: str, before: str) -> ValueError:
    """A carry that holds more than the latents of its own step."""
    return ValueError(
        f"The chain of '{chain}' is not of first order: after a step, the carry{carry} of its `scan` depends on the "
        f"carry{before} before the step, which depends on latents. Each step must read the latents of the step before "
        "it, and no others, so that paths through samples have a weight for each step. Make what is carried on a site "
        "of its own, drawn at each step; for a chain of second order, draw two steps in each turn of the scan."
    )


def summed_carry_error(chain: str, carry: str, summed: str) -> ValueError:
    """A carry that depends on a latent that is summed out."""
    return ValueError(
        f"In the chain of '{chain}', the carry{carry} of `scan` depends on '{summed}', which is summed out. In a chain "
        f"of samples a sum is over one step. Remove '{summed}' from the carry, or its mark infer={{'enumerate': "
        "'parallel'}, so that the guide samples it."
    )


def outside_error(site: str, chain: str) -> ValueError:
    """A site outside of a chain's `scan` that depends on its latents."""
    return ValueError(
        f"Site '{site}' is not in the `scan` that draws '{chain}', but depends on its latents. With `chain_particles` "
        "these have many values at each step, and all paths through them count. Move the site into the body of the "
        f"scan (data as its `xs`), or remove '{chain}' from `chain_particles`."
    )


def guide_outside_error(site: str, chain: str, latent: str) -> ValueError:
    """A guide site that depends on latents of a chain, or one of a chain that depends on local ones."""
    return ValueError(
        f"The guide's site '{site}' depends on '{latent}', but with `chain_particles={{'{chain}': …}}` the latents of "
        "a chain are drawn given the sites outside of chains and named plates, and no other site is drawn given them. "
        f"Draw it before, or given other sites; AutoMixed(model, chains={{'{chain}'}}) does."
    )


def steps_depend_error(site: str, chain: str) -> ValueError:
    """Steps of a guide that depend on each other."""
    return ValueError(
        f"The guide's steps depend on each other: the density of '{site}' at one step depends on the latents of "
        f"others. With `chain_particles={{'{chain}': …}}` each step is drawn given what is outside of the chain only, "
        "so that each path through the samples is as likely as another. Use "
        f"AutoMixed(model, chains={{'{chain}'}}), or remove '{chain}' from `chain_particles`."
    )
