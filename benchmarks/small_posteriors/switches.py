"""One location and one switch: units from 1e-4 to 1e4, and priors up to 1,000 times as wide as the noise."""

import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy import stats

from benchmarks.small_posteriors.problem import Problem, line, states


def model(x, noise, width, step, share):
    mu = numpyro.sample("mu", dist.Normal(0.0, width))
    z = numpyro.sample("z", dist.Bernoulli(share))
    numpyro.sample("x", dist.Normal(mu + step * z, noise), obs=x)


def log_joint(latents, x, noise, width, step, share):
    mu, z = latents["mu"], latents["z"]
    prior = stats.norm.logpdf(mu, 0, width) + stats.bernoulli.logpmf(z, share)
    return prior + stats.norm.logpdf(x, mu + step * z, noise)


def switch(name, x, noise, width, step, share):
    args = (x, noise, width, step, share)
    shrink = width**2 / (width**2 + noise**2)
    sd, centres = noise * np.sqrt(shrink), (shrink * (x - step), shrink * x)
    return Problem(
        name,
        model,
        args,
        {"mu": line(min(centres) - 10 * sd, max(centres) + 10 * sd, sd / 8), "z": states(0, 1)},
        lambda latents: log_joint(latents, *args),
        {"mu": lambda draws: draws["mu"], "z": lambda draws: draws["z"]},
    )


def wide(width, x):
    """A prior that is so many times as wide as the noise."""
    return switch(f"wide_{width:g}_x_{x:g}", x, 1 / width, 1.0, 2 / width, 0.5)


PROBLEMS = [
    *(switch(f"switch_unit_{u:g}", 20 * u, 3 * u, 10 * u, 3 * u, 0.4) for u in (1.0, 1e-4, 1e-2, 0.1, 10.0, 1e4)),
    *(wide(width, 0.3) for width in (1.0, 10.0, 100.0, 700.0, 1000.0)),
    wide(100.0, 3.0),
]
