"""State-space models by score-function gradients, against the Kalman filter and a particle filter.

    python examples/state_space.py             # about 6 minutes
    python examples/state_space.py --quick     # seconds

(a) A linear Gaussian model, whose log evidence the Kalman filter gives exactly. The guide is Gaussian as well, but
    claims to have no reparameterised sampler. What does each estimator lose against doubly reparameterised gradients?
(b) A population of animals with integer states: binomial survival, Poisson births, counted with noise. Nothing can be
    reparameterised, and states are too many to enumerate. The truth is a bootstrap filter of 100,000 particles.

Both guides are autoregressive: they draw the state at t given that at t - 1 and the observations at t and t + 1.
"""

import argparse
from functools import partial
import itertools
from pathlib import Path

import jax
from jax import random
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np
import numpyro
from numpyro.contrib.control_flow import scan
import numpyro.distributions as dist
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import SVI
from numpyro.infer.util import log_density
import optax
import pandas as pd
from scipy.special import logsumexp, softmax
from scipy.stats import norm

from numpyro_vimco import REINFORCE, VIMCO, ReweightedWakeSleep, VIMCOStar
from numpyro_vimco.control_variates import vr_iwae_bound

LENGTH = 30
DECAY, STEP_SD, SD = 0.95, 1.0, 2.0  # (a): of the state, its noise, and that of an observation
SURVIVAL, BIRTHS, ARRIVALS, RELEASED, COUNT_SD = 0.7, 0.25, 2.0, 40, 5.0  # (b)


def gaussian_model(y):
    def step(x, y):
        x = numpyro.sample("x", dist.Normal(DECAY * x, STEP_SD))
        numpyro.sample("y", dist.Normal(x, SD), obs=y)
        return x, None

    scan(step, 0.0, y)


def gaussian_guide(y, normal=dist.Normal):
    y_pairs = jnp.stack([y, jnp.append(y[1:], y[-1])], axis=1)  # each observation beside the next
    gain = numpyro.param("gain", jnp.zeros((LENGTH, 2)))
    width = numpyro.param("width", jnp.ones(LENGTH), constraint=dist.constraints.positive)

    def step(x, now):
        y_pair, gain, width = now
        x = numpyro.sample("x", normal(DECAY * x + gain @ (y_pair - DECAY * x), width))
        return x, None

    scan(step, 0.0, (y_pairs, gain, width))


class ScoreNormal(dist.Normal):
    reparametrized_params = []  # its samples carry no gradient, like those of a discrete distribution


def population_model(y):
    def step(count, y):
        survivors = numpyro.sample("survivors", dist.Binomial(count, SURVIVAL))
        births = numpyro.sample("births", dist.Poisson(BIRTHS * count + ARRIVALS))
        numpyro.sample("y", dist.Normal(survivors + births, COUNT_SD), obs=y)
        return survivors + births, None

    scan(step, RELEASED, y)


def grid_normal(mean, width, most=jnp.inf):
    """Normal on the integers from 0 to ``most``: the posterior is narrower than any Poisson."""
    grid = jnp.arange(101)  # births and survivors above have probability 1e-8
    return dist.Categorical(logits=jnp.where(grid <= most, -0.5 * ((grid - mean) / width) ** 2, -jnp.inf))


def population_guide(y):
    y_pairs = jnp.stack([y, jnp.append(y[1:], y[-1])], axis=1)  # each observation beside the next
    gain = numpyro.param("gain", jnp.full((LENGTH, 2, 2), 0.2))
    width = numpyro.param("width", jnp.full((LENGTH, 2), 3.0), constraint=dist.constraints.positive)

    def step(count, now):
        y_pair, gain, width = now
        rate = BIRTHS * count + ARRIVALS
        mean = SURVIVAL * count + gain[0] @ (y_pair - SURVIVAL * count - rate)
        survivors = numpyro.sample("survivors", grid_normal(mean, width[0], most=count))
        mean = rate + gain[1] @ (y_pair - survivors - rate)
        return survivors + numpyro.sample("births", grid_normal(mean, width[1])), None

    scan(step, RELEASED, (y_pairs, gain, width))


def kalman_log_evidence(y):
    """Exact log evidence of (a), in nats (float64)."""
    mean, variance, log_evidence = 0.0, 0.0, 0.0
    for observed in np.asarray(y, float):
        mean, variance = DECAY * mean, DECAY**2 * variance + STEP_SD**2
        log_evidence += norm.logpdf(observed, mean, (variance + SD**2) ** 0.5)
        gain = variance / (variance + SD**2)
        mean, variance = mean + gain * (observed - mean), gain * SD**2
    return log_evidence


def gaussian_step(rng, x):
    return DECAY * x + STEP_SD * rng.standard_normal(x.shape)


def population_step(rng, count):
    return rng.binomial(count, SURVIVAL) + rng.poisson(BIRTHS * count + ARRIVALS)


def simulate(step, start, sd, rng):
    """A path and noisy observations of it, each of shape (length,)."""
    path = itertools.accumulate(range(LENGTH), lambda x, _: step(rng, x), initial=np.array([start]))
    path = np.concatenate(list(path)[1:])
    return path, jnp.asarray(path + sd * rng.standard_normal(LENGTH), jnp.float32)


def bootstrap_filter(step, start, sd, y, size, rng):
    """Log evidence in nats, and paths drawn from the posterior, of shape (size, length)."""
    paths, log_evidence = np.full((size, 1), start), 0.0
    for observed in np.asarray(y, float):
        x = step(rng, paths[:, -1])
        weights = norm.pdf(observed, x, sd)
        log_evidence += np.log(weights.mean())
        paths = np.column_stack([paths, x])[rng.choice(size, size, p=weights / weights.sum())]
    return log_evidence, paths[:, 1:]


def make_sampler(model, guide, y, num_draws):
    """A compiled function from parameters to draws of the guide and their log-weights."""

    def draw(params, key):
        sites = trace(seed(substitute(guide, params), key)).get_trace(y)
        sample = {name: site["value"] for name, site in sites.items() if site["type"] == "sample"}
        log_p, _ = log_density(model, (y,), {}, sample)
        log_q, _ = log_density(substitute(guide, params), (y,), {}, sample)
        return sample, log_p - log_q

    keys = random.split(random.key(1), num_draws)
    return jax.jit(lambda params: jax.lax.map(partial(draw, params), keys, batch_size=1024))


def compare(model, cases, orders, numbers, y, log_evidence, args):
    """Fit each case: a table of bounds, and draws and log-weights of each estimator's last fit.

    The bound is the one that was optimised, in nats; efficiency is the guide's effective sample size per draw.
    """
    rows, draws = [], {}
    samplers = {guide: make_sampler(model, guide, y, args.num_draws) for guide, _ in cases.values()}
    for (name, (guide, objective)), alpha, number in itertools.product(cases.items(), orders, numbers):
        if name == "RWS" and alpha > 0:
            continue
        adam = optax.adam(optax.cosine_decay_schedule(0.03, args.num_steps))
        svi = SVI(model, guide, adam, objective(alpha, number))
        params = svi.run(random.key(args.seed), args.num_steps, y, progress_bar=False).params
        draws[name] = samplers[guide](params)
        log_weights = draws[name][1]
        bounds = np.asarray(vr_iwae_bound(log_weights.reshape(-1, number).T, alpha))
        efficiency = 1 / np.sum(softmax(np.asarray(log_weights)) ** 2) / len(log_weights)
        numbers = (bounds.mean(), bounds.std() / len(bounds) ** 0.5, log_evidence - bounds.mean(), efficiency)
        rows.append((name, alpha, number, *numbers))
    table = pd.DataFrame(rows, columns=["estimator", "α", "N", "bound", "error", "gap", "efficiency"])
    for title in ("gap", "error", "efficiency"):
        wide = table.pivot(index=["α", "N"], columns="estimator", values=title)[list(cases)]
        print(f"{title}\n{wide.to_string(float_format='%.3g', na_rep='')}\n", flush=True)
    return table, draws


def plot(tables, bands, path, y, filename):
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    *panels, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.5])
    styles = {"REINFORCE": "k:x", "VIMCO": "C1--^", "VIMCO-⋆": "C0-o", "RWS": "C3-.s", "doubly reparam.": "C2-D"}
    for axes, (title, table) in zip(panels, tables.items()):
        wide = table[table["α"] == 0].pivot(index="N", columns="estimator", values="efficiency")
        wide[[name for name in styles if name in wide]].plot(ax=axes, style=styles, logx=True, ylim=(0, 1))
        axes.set_xticks(wide.index, wide.index.astype(str))
        axes.set(title=f"{title}, α = 0", xlabel="particles N", ylabel="efficiency of the fitted guide")
        axes.minorticks_off()
    for (name, band), style in zip(bands.items(), ["k-", "C0--", "C1:"]):
        right.plot(band.T, style, label=[name, None, None])
    right.plot(path, "kD", ms=4, label="true path")
    right.plot(y, "k+", ms=8, label="observed")
    right.set(title="(b) population: 5, 50 and 95 % of the posterior", xlabel="t", ylabel="animals")
    right.legend(fontsize="small")
    figure.savefig(filename, dpi=90)


def main(args):
    rng = np.random.default_rng(args.seed)
    objectives = {"VIMCO-⋆": VIMCOStar}
    if not args.quick:
        objectives |= {"REINFORCE": REINFORCE, "VIMCO": VIMCO, "RWS": lambda _, number: ReweightedWakeSleep(number)}
    y = simulate(gaussian_step, 0.0, SD, rng)[1]
    print(f"(a) Linear Gaussian model: log evidence {kalman_log_evidence(y):.3f} nats by the Kalman filter")
    score_guide = partial(gaussian_guide, normal=ScoreNormal)
    cases = {name: (score_guide, objective) for name, objective in objectives.items()}
    cases["doubly reparam."] = gaussian_guide, VIMCOStar
    gaussian, _ = compare(gaussian_model, cases, args.orders, args.numbers[0], y, kalman_log_evidence(y), args)

    path, y = simulate(population_step, RELEASED, COUNT_SD, rng)
    filters = [bootstrap_filter(population_step, RELEASED, COUNT_SD, y, args.filter_size, rng) for _ in range(10)]
    evidences, paths = zip(*filters)
    log_evidence, error = logsumexp(evidences) - np.log(10), np.std(evidences) / 10**0.5
    print(f"(b) Population: log evidence {log_evidence:.3f} ± {error:.3f} nats by 10 bootstrap filters")
    cases = {name: (population_guide, objectives[name]) for name in objectives if name != "REINFORCE"}  # it diverges
    population, draws = compare(population_model, cases, [0.0], args.numbers[1], y, log_evidence, args)
    sample, log_weights = draws["VIMCO-⋆"]
    drawn = np.asarray(sample["survivors"] + sample["births"])
    quantiles = partial(np.quantile, q=[0.05, 0.5, 0.95], axis=0, method="inverted_cdf")
    bands = {
        "bootstrap filter": quantiles(np.concatenate(paths)),
        "VIMCO-⋆, weighted draws": quantiles(drawn, weights=softmax(np.asarray(log_weights))),
        "VIMCO-⋆, guide alone": quantiles(drawn),
    }
    print("Largest distance of 5, 50 and 95 % quantiles from the bootstrap filter's, in animals")
    for name, band in list(bands.items())[1:]:
        print(f"{name:>24} {np.abs(band - bands['bootstrap filter']).max():5.0f}")
    args.output.mkdir(parents=True, exist_ok=True)
    tables = {"(a) linear Gaussian": gaussian, "(b) population": population}
    pd.concat(tables, names=["model"]).to_csv(args.output / "state_space.csv", float_format="%.6g")
    plot(tables, bands, path, y, args.output / "state_space.png")
    print(f"\nSaved state_space.csv and state_space.png in {args.output}/")
    return tables, bands


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="VIMCO-⋆, α = 0, N = 32, fewer steps and draws")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("output"))
    args = parser.parse_args(argv)
    args.orders = [0.0] if args.quick else [0.0, 0.5, 1.0]
    args.numbers = ([32], [32]) if args.quick else ([4, 32, 256], [4, 64])  # of particles, in (a) and in (b)
    quick, full = (300, 2**13, 10_000), (1000, 2**16, 100_000)
    args.num_steps, args.num_draws, args.filter_size = quick if args.quick else full
    return args


if __name__ == "__main__":
    main(parse())
