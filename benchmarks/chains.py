"""Time series: chains of samples beside exact posteriors, or beside a long run of NUTS.

python benchmarks/chains.py [NAME ...] [--steps-in-time 30] [--samples 1 4 8 16] [--seeds 3] [--planned] [--sites 50]

- *population*: N_1 ~ Poisson(initial), N_t ~ Poisson(growth N_{t-1} + 1), y_t ~ Binomial(N_t, detection).
- *survivors*: S_t ~ Binomial(N_{t-1}, survival), R_t ~ Poisson(gain), N_t = S_t + R_t, y_t ~ Binomial(N_t, detection):
  two latents of one step, of which one is bounded by the step before it.
- *epidemic*: new_t ~ Binomial(50 - I_{t-1}, 1 - exp(-contact I_{t-1} / 50)), still_t ~ Binomial(I_{t-1}, stay), I_t =
  new_t + still_t, y_t ~ Binomial(new_t, reported): chain-binomial, who recovers can fall ill again.
- *gaussian*: x_t ~ Normal(memory x_{t-1}, noise), y_t ~ Normal(x_t, error).
- *outliers*: the same with y_t ~ StudentT(3, x_t, error).
- *volatility*: daily returns of the S&P 500 in percent, from 2008-06-02 on (of the package `arch`, which has to be
  installed); y_t ~ Normal(0, exp(h_t / 2)), h_t ~ Normal(level + memory (h_{t-1} - level), noise).
- *sites*: *population* at 50 sites, with a covariate of the initial number, of growth and of detection.

Three numbers of each are unknown, of *sites* six. The truth of the first four is a sum over all states, or the Kalman
filter, at each point of a grid of the three. That of *outliers* and *volatility* is NUTS over all latents; that of
*sites* is NUTS over the six, with the counts summed out up to 80. Their log evidence is not known.

For each number K of samples of a step and each seed: the verdict, the error of the log evidence in nats, the largest
error of the mean of a global latent in posterior standard deviations, the ESS, and seconds of processor and of wall for
`fit` with its verdict and 4,000 draws, compilation counted. K = 1 is a fit without `chain_particles`: a path is one
particle. ``--dynestyx PYTHON`` has the population by a particle filter inside of Metropolis, for comparison. With
``--planned`` the fits are ``fit(model, key, num_steps, data)`` alone. The last line is the memory of the process.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
import json
from pathlib import Path
import resource
import subprocess
import time

from common import HEADER, row
import jax
from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.contrib.control_flow import scan
from numpyro.diagnostics import summary
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS, SVI
import optax
import pandas as pd
from scipy.special import expit
from scipy.stats import binom, norm, poisson

from numpyro_vimco import AutoMixed, VIMCOStar

SIZE = 50  # of the population of the epidemic


def share(name, loc=0.0, scale=0.5):
    """A number between 0 and 1 whose logit is Normal."""
    sigmoid = dist.transforms.SigmoidTransform()
    return numpyro.sample(name, dist.TransformedDistribution(dist.Normal(loc, scale), sigmoid))


@dataclass(frozen=True)
class Problem:
    """A series of counts with an exact posterior.

    :ivar model: from the data; its global latents are those of ``priors``.
    :ivar chain: a latent of its `scan`.
    :ivar simulate: from a number of steps to data.
    :ivar priors: of each global latent its transform from a Normal, and location and scale of that.
    :ivar grid: the ends of its grid, and its number of points, before the transform.
    :ivar log_likelihoods: from data, one value of the first two global latents, and an array of the third, to an array.
    """

    model: Callable
    chain: str
    simulate: Callable
    priors: dict[str, tuple[Callable, float, float]]
    grid: dict[str, tuple[float, float, int]]
    log_likelihoods: Callable

    def exact(self, seen):
        """Log evidence in nats or None, and mean and standard deviation of each global latent."""
        points = {name: np.linspace(*self.grid[name]) for name in self.priors}
        values = {name: transform(points[name]) for name, (transform, _, _) in self.priors.items()}
        first, second, third = values.values()
        log_p = np.array([[self.log_likelihoods(seen, a, b, third) for b in second] for a in first])
        for i, (name, (_, loc, scale)) in enumerate(self.priors.items()):
            log_p += norm.logpdf(points[name], loc, scale).reshape([-1 if j == i else 1 for j in range(3)])
        cell = np.prod([x[1] - x[0] for x in points.values()])
        weight = np.exp(log_p - log_p.max())
        log_evidence = np.log(weight.sum() * cell) + log_p.max()
        weight /= weight.sum()
        moments = {}
        for i, (name, value) in enumerate(values.items()):
            marginal = weight.sum(tuple(j for j in range(3) if j != i))
            assert max(marginal[0], marginal[-1]) < 1e-4 * marginal.max(), f"the grid of {name} is too short"
            moments[name] = marginal @ value, np.sqrt(marginal @ (value - marginal @ value) ** 2)
        return log_evidence, moments


def forward(first, transition, emissions):
    """Log-likelihoods for emissions of shape (steps, points, states), by a recursion over all states."""
    alpha, total = first * emissions[0], 0.0
    for emission in emissions[1:]:
        sums = alpha.sum(-1, keepdims=True)
        total = total + np.log(sums[..., 0])
        alpha = (alpha / sums) @ transition * emission
    return total + np.log(alpha.sum(-1))


@dataclass(frozen=True)
class ByNUTS:
    """A time series whose posterior is known from a long run.

    :ivar model: from the data.
    :ivar chain: a latent of its `scan`.
    :ivar simulate: from a number of steps to the data.
    :ivar reference: the model of which NUTS draws.
    :ivar num_samples: how many it draws in each of two chains.
    """

    model: Callable
    chain: str
    simulate: Callable
    reference: Callable
    num_samples: int = 3000

    def exact(self, data):
        begin = time.process_time()
        kernel = NUTS(self.reference, target_accept_prob=0.95)
        options = {"chain_method": "vectorized", "progress_bar": False}
        mcmc = MCMC(kernel, num_warmup=500, num_samples=self.num_samples, num_chains=2, **options)
        mcmc.run(random.key(100), *data)
        draws = {name: x for name, x in mcmc.get_samples(group_by_chain=True).items() if x.ndim == 2}
        about = summary(draws)
        worst = max(x["r_hat"] for x in about.values()), min(x["n_eff"] for x in about.values())
        seconds = time.process_time() - begin
        print(f"NUTS: {seconds:.0f}s of the processor, R-hat {worst[0]:.3f}, {worst[1]:.0f} effective draws at least")
        return None, {name: (float(x["mean"]), float(x["std"])) for name, x in about.items()}


def population(seen):
    growth = numpyro.sample("growth", dist.LogNormal(0.0, 0.2))
    initial = numpyro.sample("initial", dist.LogNormal(3.0, 0.5))
    detection = share("detection")

    def year(expected, seen):
        count = numpyro.sample("count", dist.Poisson(expected))
        numpyro.sample("seen", dist.Binomial(count, detection), obs=seen)
        return growth * count + 1.0, None

    scan(year, initial, seen)


def population_data(steps):
    rng = np.random.default_rng(1)
    counts = [rng.poisson(30)]
    for _ in range(steps - 1):
        counts.append(rng.poisson(0.97 * counts[-1] + 1.0))
    return rng.binomial(counts, 0.5)


def of_population(seen, growth, initial, detection):
    counts = np.arange(220)
    transition = poisson.pmf(counts, growth * counts[:, None] + 1.0)
    return forward(poisson.pmf(counts, initial), transition, binom.pmf(seen[:, None, None], counts, detection[:, None]))


def survivors(seen):
    survival, gain = share("survival", 1.0), numpyro.sample("gain", dist.LogNormal(2.5, 0.5))
    detection = share("detection")

    def year(alive, seen):
        left = numpyro.sample("survivors", dist.Binomial(alive, survival))
        new = numpyro.sample("recruits", dist.Poisson(gain))
        numpyro.sample("seen", dist.Binomial(left + new, detection), obs=seen)
        return left + new, None

    scan(year, 40, seen)


def survivors_data(steps):
    rng, alive, seen = np.random.default_rng(2), 40, []
    for _ in range(steps):
        alive = rng.binomial(alive, 0.7) + rng.poisson(12)
        seen.append(rng.binomial(alive, 0.5))
    return np.array(seen)


def of_survivors(seen, survival, gain, detection):
    counts = np.arange(130)
    left = binom.pmf(counts, counts[:, None], survival)
    transition = left @ poisson.pmf(counts - counts[:, None], gain)
    emissions = binom.pmf(seen[:, None, None], counts, detection[:, None])
    return forward(transition[40], transition, emissions)


def epidemic(seen):
    contact, stay = numpyro.sample("contact", dist.LogNormal(0.0, 0.5)), share("stay")
    reported = share("reported", 0.5)

    def week(ill, seen):
        risk = 1 - jnp.exp(-contact * ill / SIZE)
        new = numpyro.sample("new", dist.Binomial(SIZE - ill, risk))
        still = numpyro.sample("still", dist.Binomial(ill, stay))
        numpyro.sample("seen", dist.Binomial(new, reported), obs=seen)
        return new + still, None

    scan(week, 3, seen)


def epidemic_data(steps):
    rng, ill, seen = np.random.default_rng(3), 3, []
    for _ in range(steps):
        new = rng.binomial(SIZE - ill, 1 - np.exp(-1.1 * ill / SIZE))
        ill = new + rng.binomial(ill, 0.5)
        seen.append(rng.binomial(new, 0.6))
    return np.array(seen)


def of_epidemic(seen, contact, stay, reported):
    ill = np.arange(SIZE + 1)
    new = binom.pmf(ill, SIZE - ill[:, None], 1 - np.exp(-contact * ill[:, None] / SIZE))
    still = binom.pmf(ill, ill[:, None], stay)
    later = ill - ill[:, None]  # who is still ill, of those ill now and new
    joint = new[:, :, None] * np.where(later >= 0, still[:, np.maximum(later, 0)], 0)
    alpha, total = np.zeros((len(reported), SIZE + 1)), 0.0
    alpha[:, 3] = 1.0
    for y in seen:
        alpha = np.einsum("rn,rnm->rm", binom.pmf(y, ill, reported[:, None]), np.tensordot(alpha, joint, axes=1))
        sums = alpha.sum(-1, keepdims=True)
        total, alpha = total + np.log(sums[:, 0]), alpha / sums
    return total


def gaussian(seen, observation=dist.Normal):
    memory = share("memory", 1.0)
    noise = numpyro.sample("noise", dist.LogNormal(0.0, 0.5))
    error = numpyro.sample("error", dist.LogNormal(0.0, 0.5))

    def step(x, seen):
        x = numpyro.sample("x", dist.Normal(memory * x, noise))
        numpyro.sample("seen", observation(x, error), obs=seen)
        return x, None

    scan(step, 0.0, seen)


def outliers(seen):
    gaussian(seen, lambda x, error: dist.StudentT(3.0, x, error))


def gaussian_data(steps, student=False):
    rng, x, seen = np.random.default_rng(4), 0.0, []
    for _ in range(steps):
        x = rng.normal(0.8 * x, 1.0)
        seen.append(x + 1.2 * (rng.standard_t(3) if student else rng.normal()))
    return np.array(seen, np.float32)


def of_gaussian(seen, memory, noise, error):
    """Kalman filter, for an array of errors."""
    mean, variance, total = np.zeros_like(error), np.zeros_like(error), 0.0
    for y in seen:
        mean, variance = memory * mean, memory**2 * variance + noise**2
        total = total + norm.logpdf(y, mean, np.sqrt(variance + error**2))
        gain = variance / (variance + error**2)
        mean, variance = mean + gain * (y - mean), (1 - gain) * variance
    return total


def volatility(returns):
    level = numpyro.sample("level", dist.Normal(0.0, 1.0))
    memory = share("memory", 3.0, 1.0)
    noise = numpyro.sample("noise", dist.LogNormal(-1.5, 0.5))

    def day(before, seen):
        h = numpyro.sample("h", dist.Normal(level + memory * (before - level), noise))
        numpyro.sample("seen", dist.Normal(0.0, jnp.exp(h / 2)), obs=seen)
        return h, None

    scan(day, level, returns)


def volatility_data(steps):
    path = Path(find_spec("arch").submodule_search_locations[0]) / "data" / "sp500" / "sp500.csv.gz"
    prices = pd.read_csv(path, index_col="Date", parse_dates=True)["Adj Close"]
    returns = 100 * np.log(prices).diff()["2008-06-02":]
    return (np.asarray(returns[:steps], np.float32),)


SITES, MOST = 50, 80


def of_sites(habitat, winter, effort):
    """Numbers of all sites: expected at first, growth of each year, and detection."""
    locs = {"abundance": 2.0, "habitat": 0.0, "growth": 0.0, "winter": 0.0, "detection": 0.0, "effort": 0.0}
    a, b, c, d, e, f = (numpyro.sample(f"{name}_effect", dist.Normal(loc, 0.5)) for name, loc in locs.items())
    return jnp.exp(a + b * habitat), jnp.exp(c + d * winter), jax.nn.sigmoid(e + f * effort)


def sites(seen, habitat, winter, effort):
    """``seen``, ``winter`` and ``effort`` have shape (years, sites)."""
    initial, growth, detection = of_sites(habitat, winter, effort)

    def year(expected, now):
        seen, growth, detection = now
        with numpyro.plate("site", len(habitat)):
            count = numpyro.sample("count", dist.Poisson(expected))
            numpyro.sample("seen", dist.Binomial(count, detection), obs=seen)
        return growth * count + 0.5, None

    scan(year, initial, (seen, growth, detection))


def sites_summed(seen, habitat, winter, effort):
    initial, growth, detection = of_sites(habitat, winter, effort)
    counts = jnp.arange(MOST + 1)

    def of_site(seen, initial, growth, detection):
        emission = dist.Binomial(counts, detection[:, None]).log_prob(seen[:, None])
        emission = jnp.where(counts < seen[:, None], -1e4, emission)

        def year(log_alpha, now):
            emission, growth = now
            expected = growth * counts[:, None] + 0.5
            move = jnp.exp(counts * jnp.log(expected) - expected - jax.scipy.special.gammaln(counts + 1.0))
            largest = log_alpha.max()
            return jnp.log(jnp.exp(log_alpha - largest) @ move + 1e-30) + largest + emission, None

        first = dist.Poisson(initial).log_prob(counts) + emission[0]
        return jax.nn.logsumexp(jax.lax.scan(year, first, (emission[1:], growth[:-1]))[0])

    numpyro.factor("data", jax.vmap(of_site, (1, 0, 1, 1))(seen, initial, growth, detection).sum())


def sites_data(steps, number=SITES):
    rng = np.random.default_rng(5)
    habitat, winter, effort = (rng.normal(size=shape) for shape in (number, (steps, number), (steps, number)))
    count, seen = rng.poisson(np.exp(2.3 + 0.4 * habitat)), []
    for t in range(steps):
        seen.append(rng.binomial(count, expit(0.2 + 0.4 * effort[t])))
        count = np.minimum(rng.poisson(np.exp(-0.05 + 0.1 * winter[t]) * count + 0.5), MOST)
    return tuple(np.asarray(x, np.float32) for x in (np.array(seen), habitat, winter, effort))


PROBLEMS = {
    "population": Problem(
        population,
        "count",
        population_data,
        {"growth": (np.exp, 0.0, 0.2), "initial": (np.exp, 3.0, 0.5), "detection": (expit, 0.0, 0.5)},
        {"growth": (-0.3, 0.15, 46), "initial": (1.6, 5.4, 40), "detection": (-2.2, 2.6, 44)},
        of_population,
    ),
    "survivors": Problem(
        survivors,
        "survivors",
        survivors_data,
        {"survival": (expit, 1.0, 0.5), "gain": (np.exp, 2.5, 0.5), "detection": (expit, 0.0, 0.5)},
        {"survival": (-1.2, 3.4, 36), "gain": (0.6, 4.2, 40), "detection": (-2.4, 2.4, 40)},
        of_survivors,
    ),
    "epidemic": Problem(
        epidemic,
        "new",
        epidemic_data,
        {"contact": (np.exp, 0.0, 0.5), "stay": (expit, 0.0, 0.5), "reported": (expit, 0.5, 0.5)},
        {"contact": (-1.8, 2.2, 32), "stay": (-2.4, 2.4, 32), "reported": (-2.0, 3.0, 32)},
        of_epidemic,
    ),
    "gaussian": Problem(
        gaussian,
        "x",
        gaussian_data,
        {"memory": (expit, 1.0, 0.5), "noise": (np.exp, 0.0, 0.5), "error": (np.exp, 0.0, 0.5)},
        {"memory": (-1.6, 3.6, 60), "noise": (-2.2, 1.4, 60), "error": (-2.2, 1.4, 60)},
        of_gaussian,
    ),
    "outliers": ByNUTS(outliers, "x", lambda steps: (gaussian_data(steps, student=True),), outliers),
    "volatility": ByNUTS(volatility, "h", volatility_data, volatility),
    "sites": ByNUTS(sites, "count", sites_data, sites_summed, 1000),
}


def run(name, steps_in_time, samples, seeds, num_particles, num_steps, planned):
    problem = PROBLEMS[name]
    data = problem.simulate(steps_in_time)
    log_evidence, moments = problem.exact(data)
    known = "not known" if log_evidence is None else f"{log_evidence:.3f} nats"
    print(f"{name}, {steps_in_time} steps in time; exact log evidence {known}; {num_steps:,} steps")
    print(f"{'K':>4} {HEADER}")
    args = data if isinstance(data, tuple) else (data,)
    for number in ["plan"] if planned else samples:
        for seed in range(seeds):
            svi = problem.model  # `fit` takes a model too
            if not planned:
                chains = {problem.chain: number} if number > 1 else {}
                objective = VIMCOStar(0.5, num_particles, chain_particles=chains)
                svi = SVI(problem.model, AutoMixed(problem.model, chains=chains.keys()), optax.adam(0.02), objective)
            print(f"{number:>4} {row(svi, seed, num_steps, args, log_evidence, moments)}", flush=True)
    print(f"memory of the process at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


def by_dynestyx(python, steps_in_time, seeds):
    """The population by `dynestyx_filter.py`, in an environment of its own: errors, R-hat, ESS and seconds."""
    problem = PROBLEMS["population"]
    seen = problem.simulate(steps_in_time)
    _, moments = problem.exact(seen)
    command = [python, str(Path(__file__).parent / "dynestyx_filter.py"), json.dumps(seen.tolist())]
    for seed in range(seeds):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        run = subprocess.run([*command, "--seed", str(seed)], check=True, stdout=subprocess.PIPE, text=True)
        seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        draws = {name: np.array(x) for name, x in json.loads(run.stdout.splitlines()[-1]).items()}
        about = summary(draws)
        error = max(abs(draws[name].mean() - mean) / sd for name, (mean, sd) in moments.items())
        r_hat, ess = max(x["r_hat"] for x in about.values()), min(x["n_eff"] for x in about.values())
        print(f"dynestyx, seed {seed}: largest error {error:.2f}, R-hat {r_hat:.3f}, {ess:.0f} effective draws of "
              f"{draws['growth'].size:,}, {seconds:.0f}s of the processor", flush=True)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", default=list(PROBLEMS))
    parser.add_argument("--steps-in-time", type=int, default=30)
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-particles", type=int, default=8)
    parser.add_argument("--num-steps", type=int, default=2000)
    parser.add_argument("--sites", type=int, default=SITES, help="number of *sites*")
    parser.add_argument("--planned", action="store_true", help="`fit(model, ...)` alone")
    parser.add_argument("--dynestyx", metavar="PYTHON", help="only the population, by the dynestyx of this Python")
    args = vars(parser.parse_args())
    PROBLEMS["sites"] = replace(PROBLEMS["sites"], simulate=partial(sites_data, number=args.pop("sites")))
    if python := args.pop("dynestyx"):
        by_dynestyx(python, args["steps_in_time"], args["seeds"])
        args["problems"] = []
    for problem in args.pop("problems"):
        run(problem, **args)
