"""Supports that depend on other latents, and a density that jumps: `AutoMixed(model)` beside exact posteriors.

python benchmarks/moving_supports.py [changes] [epidemic] [threshold] [survivors] [parts] [truncated] [--seeds 3]

- *changes*: two change points of 20 counts, the second uniform after the first.
- *epidemic*: new_t ~ Binomial(S_{t-1}, 1 - exp(-contact new_{t-1} / 30)), S_t = S_{t-1} - new_t: a chain-binomial
  epidemic (Reed-Frost) in a Python loop of 12 steps, with under-reporting.
- *threshold*: a step at a latent value of a predictor, 15 points; its latent is found to jump.
- *survivors*: at three ages, with unknown survival and detection.
- *parts*: a Multinomial of a latent total, each part seen with probability 0.6.
- *truncated*: a Normal that is truncated at a latent bound.

Settings: `VIMCOStar(0.5, 64)`, 2,000 steps of Adam at 0.02, four starts. For each seed: the verdict, the error of the
log evidence in nats, the largest error of a mean in posterior standard deviations, the ESS, and seconds of processor
and of wall until the verdict and 4,000 draws, compilation counted.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
import warnings

from common import HEADER, row
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI
import optax
from scipy.special import gammaln, logsumexp
from scipy.stats import beta, binom, multivariate_normal, norm, poisson

from numpyro_vimco import AutoMixed, VIMCOStar

Moments = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Problem:
    """A model with its data, and its exact answer: log evidence in nats, and means and standard deviations."""

    model: Callable
    exact: Callable[[], tuple[float, Moments]]


def moments(weight, **values):
    """Means and standard deviations of values with (unnormalized) weights."""
    weight = weight / weight.sum()
    found = {}
    for name, value in values.items():
        mean = (weight * value).sum()
        found[name] = mean, np.sqrt((weight * (value - mean) ** 2).sum())
    return found


COUNTS = np.array([3, 2, 4, 3, 1, 9, 8, 10, 7, 9, 11, 8, 3, 2, 4, 2, 3, 1, 2, 4])


def changes():
    first = numpyro.sample("first", dist.DiscreteUniform(1, 18))
    second = numpyro.sample("second", dist.DiscreteUniform(first + 1, 19))
    with numpyro.plate("level", 3):
        rate = numpyro.sample("rate", dist.Gamma(2.0, 0.4))
    time_of = jnp.arange(20)
    level = jnp.where(time_of < first, rate[0], jnp.where(time_of < second, rate[1], rate[2]))
    numpyro.sample("y", dist.Poisson(level), obs=COUNTS)


def exact_changes():
    total = np.concatenate([[0], np.cumsum(COUNTS)])

    def part(a, b):  # of counts from a to b, without their factorials: the rate is integrated out
        s, n = total[b] - total[a], b - a
        return 2 * np.log(0.4) - gammaln(2) + gammaln(2 + s) - (2 + s) * np.log(0.4 + n)

    pairs = np.array([(a, b) for a in range(1, 19) for b in range(a + 1, 20)])
    log_p = np.array([part(0, a) + part(a, b) + part(b, 20) - np.log(18 * (19 - a)) for a, b in pairs])
    log_p -= gammaln(COUNTS + 1).sum()
    weight = np.exp(log_p - log_p.max())
    return logsumexp(log_p), moments(weight, first=pairs[:, 0], second=pairs[:, 1])


REPORTED = np.array([1, 1, 1, 1, 2, 1, 1, 0, 0, 1, 0, 0])


def epidemic():
    contact = numpyro.sample("contact", dist.LogNormal(0.0, 0.5))
    reported = numpyro.sample("reported", dist.Beta(3.0, 2.0))
    susceptible, new = 28, 2
    for t in range(len(REPORTED)):
        new = numpyro.sample(f"new_{t}", dist.Binomial(susceptible, 1 - jnp.exp(-contact * new / 30)))
        susceptible = susceptible - new
        numpyro.sample(f"y_{t}", dist.Binomial(new, reported), obs=REPORTED[t])


def exact_epidemic(points=60):
    log_contact, reported, n = np.linspace(-2, 2, points), (np.arange(points) + 0.5) / points, np.arange(31)
    likelihood = np.zeros((points, points))
    for i, contact in enumerate(np.exp(log_contact)):
        infected = binom.pmf(n, n[:, None, None], (1 - np.exp(-contact * n / 30))[:, None])  # susceptible, before, new
        alpha = np.zeros((points, 31, 31))
        alpha[:, 28, 2] = 1
        for y in REPORTED:
            found = np.einsum("rsi,sij->rsj", alpha, infected) * binom.pmf(y, n, reported[:, None])[:, None]
            alpha = np.zeros_like(alpha)
            for s in range(31):
                for j in range(s + 1):
                    alpha[:, s - j, j] += found[:, s, j]
        likelihood[i] = alpha.sum((1, 2))
    weight = likelihood * norm.pdf(log_contact, 0, 0.5)[:, None] * beta.pdf(reported, 3, 2)
    log_evidence = np.log(weight.sum() * (log_contact[1] - log_contact[0]) / points)
    return log_evidence, moments(weight, contact=np.exp(log_contact)[:, None], reported=reported)


X = np.linspace(-2.0, 2.0, 15)
Y = np.where(X > 0.3, 1.0, -1.0) + 0.3 * np.cos(7 * X)


def threshold():
    cut = numpyro.sample("cut", dist.Normal(0.0, 1.0))
    with numpyro.plate("side", 2):
        level = numpyro.sample("level", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(jnp.where(X > cut, level[1], level[0]), 0.5), obs=Y)


def exact_threshold():
    cut = np.linspace(-6, 6, 40_001)
    side = np.searchsorted(X, cut)
    log_p = norm.logpdf(cut)
    for i in range(16):
        for part in (Y[:i], Y[i:]):
            if len(part):
                log_p[side == i] += multivariate_normal.logpdf(part, cov=0.25 * np.eye(len(part)) + 1.0)
    weight = np.exp(log_p)
    return np.log(weight.sum() * (cut[1] - cut[0])), moments(weight, cut=cut)


def survivors():
    detection = numpyro.sample("detection", dist.Beta(2.0, 2.0))
    survival = numpyro.sample("survival", dist.Beta(4.0, 2.0))
    born = numpyro.sample("born", dist.Poisson(20.0))
    one = numpyro.sample("one", dist.Binomial(born, survival))
    two = numpyro.sample("two", dist.Binomial(one, survival))
    numpyro.sample("y", dist.Binomial(jnp.stack([born, one, two]), detection), obs=np.array([14, 9, 6]))


def exact_survivors(points=300):
    grid, n = (np.arange(points) + 0.5) / points, np.arange(70)
    seen = [binom.pmf(y, n[:, None], grid) for y in (14, 9, 6)]  # number alive, detection
    weight = np.zeros((points, points))
    for i, survival in enumerate(grid):
        left = binom.pmf(n, n[:, None], survival)
        later = left @ (seen[1] * (left @ seen[2]))
        weight[i] = poisson.pmf(n, 20) @ (seen[0] * later) * beta.pdf(survival, 4, 2) * beta.pdf(grid, 2, 2)
    return np.log(weight.sum() / points**2), moments(weight, survival=grid[:, None], detection=grid)


SHARES = np.array([0.2, 0.3, 0.5])
PARTS = np.array([1, 4, 3])


def parts():
    total = numpyro.sample("total", dist.Poisson(12.0))
    number = numpyro.sample("parts", dist.Multinomial(total, SHARES, total_count_max=100))
    numpyro.sample("y", dist.Binomial(number, 0.6).to_event(1), obs=PARTS)


def exact_parts():
    """Parts of a Poisson total are independent Poisson numbers, and so are the seen and the unseen of each."""
    unseen = 12 * SHARES * 0.4
    return poisson.logpmf(PARTS, 12 * SHARES * 0.6).sum(), {"parts": (PARTS + unseen, np.sqrt(unseen))}


def truncated():
    bound = numpyro.sample("bound", dist.Normal(0.0, 1.0))
    z = numpyro.sample("z", dist.TruncatedNormal(0.0, 1.0, low=bound))
    numpyro.sample("y", dist.Normal(z, 0.7), obs=np.array([1.2, 0.3, 0.8]))


def exact_truncated():
    bound, z = np.linspace(-5, 5, 3001)[:, None], np.linspace(-5, 6, 3001)
    of_z = norm.pdf(z) * np.prod([norm.pdf(y, z, 0.7) for y in (1.2, 0.3, 0.8)], axis=0)
    weight = norm.pdf(bound) * np.where(z > bound, of_z / norm.sf(bound), 0)
    return np.log(weight.sum() * (10 / 3000) * (11 / 3000)), moments(weight, bound=bound, z=z)


PROBLEMS = {
    "changes": Problem(changes, exact_changes),
    "epidemic": Problem(epidemic, exact_epidemic),
    "threshold": Problem(threshold, exact_threshold),
    "survivors": Problem(survivors, exact_survivors),
    "parts": Problem(parts, exact_parts),
    "truncated": Problem(truncated, exact_truncated),
}


def run(name, seeds):
    problem = PROBLEMS[name]
    exact = problem.exact()
    for seed in range(seeds):
        svi = SVI(problem.model, AutoMixed(problem.model), optax.adam(0.02), VIMCOStar(0.5, 64))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The density jumps")
            print(f"{name:>10} {row(svi, seed, 2000, (), *exact)}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", default=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    print(f"{'':>10} {HEADER}")
    for problem in args.problems:
        run(problem, args.seeds)
