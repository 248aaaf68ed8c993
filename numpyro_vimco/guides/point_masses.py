# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Continuous priors that give one value a probability: a guide with a density never proposes that value."""

import numpyro.distributions as dist

from numpyro_vimco.families.supports import parts

# A hurdle distribution with a continuous base has a mass at 0; NumPyro has it since 0.22. Its zero-inflated
# distributions are discrete.
MASSES = (dist.Delta, *(getattr(dist, name) for name in ("HurdleProbs",) if hasattr(dist, name)))


def check_no_point_mass(site: dict) -> None:
    """Raise for a continuous latent whose prior has a point mass.

    :raises ValueError: with the model to write instead.
    """
    if any(isinstance(part, MASSES) for part in parts(site["fn"])):
        name = site["name"]
        raise ValueError(
            f"The prior of the continuous site '{name}' has a point mass, a value with a probability, which no density "
            "can propose. Write it as a switch times a slab (for a mass at 0, with probability 0.5 of the slab):\n\n"
            f"    {name}_on = numpyro.sample('{name}_on', dist.Bernoulli(0.5))\n"
            f"    {name}_slab = numpyro.sample('{name}_slab', dist.Normal(0, 1))  # the prior without the mass\n"
            f"    {name} = numpyro.deterministic('{name}', {name}_on * {name}_slab)\n\n"
            "A value of probability 1, dist.Delta alone, is a `numpyro.deterministic` site."
        )
