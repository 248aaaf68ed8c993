"""Estimates of the evidence of a time series by K samples of each step: what fits reach, and what filters reach.

    python benchmarks/chain_estimators.py [--methods guided bootstrap …] [--samples 4 8 16 32 64 128] [--seeds 1]

The open population of `chains.py` with its three numbers known, 0.97, 30 and 0.5. ESS: of independent estimates Z of
the evidence, (sum Z)^2 / sum Z^2 over their number. ``off`` is the log of their mean, less the exact log evidence.

- *VIMCO-⋆*, *VIMCO*: two particles of K samples of each step, of which all paths count; 2,000 steps of one start at
  α = 0, without tempering. VIMCO (not in the library) replaces what a sample contributes by the mean of the other
  samples of its step.
- *joint*: K particles that are whole paths, by VIMCO-⋆, with a guide that is autoregressive over time and
  begins at twice what was seen. Where it finds no possible path, that counts as an ESS of zero.
- *bootstrap*: a particle filter of K particles that move by the model and are resampled at each step.
- *guided*: one whose particles move given the next datum, and are resampled before they move. For these counts both
  distributions are Poisson and known; for most models they are not.

Then the signal-to-noise ratio of one gradient of both estimators, at parameters that VIMCO-⋆ with K = 16 has found: the
root of the mean square over the parameters, of 200 gradients. The picture is docs/images/chains.svg, its numbers are in
chains.json. Another one, paths.svg, has paths through five samples of each year.
"""

import argparse
import json
from pathlib import Path
import time
from unittest import mock

from chains import of_population, population_data
from jax import random
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
from numpyro.contrib.control_flow import scan
import numpyro.distributions as dist
from numpyro.infer import SVI, init_to_value
import optax
from scipy.special import logsumexp
from scipy.stats import binom, poisson

from numpyro_vimco import AutoMixed, Posterior, VIMCOStar, fit
from numpyro_vimco.objectives import control_variates
from numpyro_vimco.objectives.paths import path_shares

GROWTH, INITIAL, DETECTION = 0.97, 30.0, 0.5
IMAGES = Path(__file__).parents[1] / "docs" / "images"
RESULTS = IMAGES / "chains.json"
RUNS, STEPS = 1000, 2000


def series(seen, growth=GROWTH):
    def year(expected, seen):
        count = numpyro.sample("count", dist.Poisson(expected))
        numpyro.sample("seen", dist.Binomial(count, DETECTION), obs=seen)
        return growth * count + 1.0, None

    scan(year, INITIAL, seen)


def vimco_signal(log_one_minus_w, share, local_log_weights, alpha):
    """VIMCO's in the place of `local_vimco_star_signal`, with the arithmetic mean: a sum over the other samples counts
    K / (K - 1) times.
    """
    assert alpha == 0
    number = len(local_log_weights)
    others = control_variates.log_one_minus_share(local_log_weights, 0.0) + np.log(number / (number - 1))
    log_rest = jnp.logaddexp(log_one_minus_w[None], jnp.log(share)[None] + others)
    return -log_rest - share[None] * control_variates.normalized_weights(local_log_weights, 0.0)


SIGNALS = {"VIMCO-⋆": control_variates.local_vimco_star_signal, "VIMCO": vimco_signal}


def with_signal(name):
    return mock.patch.object(control_variates, "local_vimco_star_signal", SIGNALS[name])


def fitted(objective, chains, seed, seen):
    begin = {} if chains else {"init_loc_fn": init_to_value(values={"count": 2 * seen + 1})}
    rate = optax.cosine_decay_schedule(0.03, STEPS)
    svi = SVI(series, AutoMixed(series, chains=chains, **begin), optax.adam(rate), objective)
    return fit(svi, random.key(seed), STEPS, seen, num_starts=1, tempering=0, progress_bar=False)


def log_weights(posterior, number):
    draws = posterior.to_arviz(num_samples=number, resample=False, pool=False, groups=(), progress_bar=False)
    return np.asarray(draws["sample_stats"]["log_weight"]).ravel()


def of_chains(estimator):
    def estimates(number, seed, seen):
        with with_signal(estimator):
            objective = VIMCOStar(0.0, 2, chain_particles={"count": number})
            return log_weights(fitted(objective, {"count"}, seed, seen), RUNS)

    return estimates


def joint(number, seed, seen):
    try:
        log_weight = log_weights(fitted(VIMCOStar(0.0, number), (), seed, seen), RUNS * number)
    except ValueError as error:
        print(error)
        return np.full(RUNS, -np.inf)
    return logsumexp(log_weight.reshape(RUNS, number), axis=1) - np.log(number)


def resampled(rng, log_weight):
    """Numbers of particles in proportion to their weights, and the log of the mean weight, for each run."""
    total = logsumexp(log_weight, axis=1, keepdims=True)
    share = np.exp(log_weight - np.where(np.isneginf(total), 0, total))  # zero where the data are impossible for all
    index = (rng.random(share.shape)[:, :, None] > np.cumsum(share, axis=1)[:, None, :]).sum(-1)
    return np.minimum(index, share.shape[1] - 1), total[:, 0] - np.log(share.shape[1])


def bootstrap(number, seed, seen):
    rng, total = np.random.default_rng(seed), 0.0
    expected = np.full((RUNS, number), INITIAL)
    for y in seen:
        count = rng.poisson(expected)
        index, log_mean = resampled(rng, binom.logpmf(y, count, DETECTION))
        total = total + log_mean
        expected = GROWTH * np.take_along_axis(count, index, axis=1) + 1.0
    return total


def guided(number, seed, seen):
    rng, total = np.random.default_rng(seed), 0.0
    expected = np.full((RUNS, number), INITIAL)
    for y in seen:
        index, log_mean = resampled(rng, poisson.logpmf(y, expected * DETECTION))
        total = total + log_mean
        unseen = rng.poisson(np.take_along_axis(expected, index, axis=1) * (1 - DETECTION))
        expected = GROWTH * (y + unseen) + 1.0
    return total


METHODS = {
    "VIMCO-⋆": of_chains("VIMCO-⋆"),
    "VIMCO": of_chains("VIMCO"),
    "guided": guided,
    "bootstrap": bootstrap,
    "joint": joint,
}


def relative_ess(log_z):
    z = np.exp(log_z - max(log_z.max(), -1e30))
    return float(z.sum() ** 2 / max((z**2).sum(), 1e-300) / len(z))


def compare(seen, methods, samples, seeds):
    """ESS of each method, number of samples and seed."""
    exact = float(of_population(seen, GROWTH, INITIAL, np.array([DETECTION]))[0])
    print(f"{len(seen)} steps in time, exact log evidence {exact:.3f} nats; of {RUNS} estimates")
    print(f"{'method':>10} {'K':>4} {'ESS':>20} {'off':>8} {'seconds':>8}")
    found = {}
    for method in methods:
        estimates = METHODS[method]
        found[method] = {}
        for number in samples:
            begin, ess, off = time.process_time(), [], []
            for seed in range(seeds):
                log_z = estimates(number, seed, seen)
                ess.append(relative_ess(log_z))
                off.append(logsumexp(log_z) - np.log(RUNS) - exact)
            found[method][number] = ess
            seconds = (time.process_time() - begin) / seeds
            shares = " ".join(f"{x:.1%}" for x in ess)
            print(f"{method:>10} {number:>4} {shares:>20} {np.median(off):>8.2f} {seconds:>8.0f}", flush=True)
    return found


def ratios(seen, samples):
    """Signal-to-noise ratio of each estimator and number of samples: the root of the mean square over the parameters.

    A mean of 200 gradients has a variance of its own, a 200th of that of one, which is subtracted.
    """
    at = fitted(VIMCOStar(0.0, 2, chain_particles={"count": 16}), {"count"}, 0, seen)
    print(f"{'SNR at K':>10} {' '.join(f'{number:>8}' for number in samples)}")
    found = {}
    for name in SIGNALS:
        found[name] = {}
        for number in samples:
            objective = VIMCOStar(0.0, 2, chain_particles={"count": number})
            svi = SVI(series, AutoMixed(series, chains={"count"}), optax.adam(0.03), objective)
            with with_signal(name):
                snr = Posterior(svi, at.params, seen).gradient_snr(random.key(1), 200, progress_bar=False)
            squares = np.concatenate([np.ravel(about.mean**2 / about.std**2) for about in snr.values()])
            found[name][str(number)] = float(np.sqrt(max(np.nanmean(squares) - 1 / 200, 0)))
        print(f"{name:>10} {' '.join(f'{snr:>8.3f}' for snr in found[name].values())}", flush=True)
    return found


def draw(found, steps):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=(3, 2), layout="constrained")
    for method, by_number in found["ess"].items():
        ess, numbers = [100 * float(np.median(values)) for values in by_number.values()], [int(k) for k in by_number]
        style = {"color": {"VIMCO-⋆": "C3", "VIMCO": "C0"}.get(method, "0.5")}
        marker = {"guided": "^", "bootstrap": "v", "joint": "x"}.get(method, "o")
        label = f"{method} filter" if method in ("guided", "bootstrap") else method
        left.plot(numbers, ess, marker=marker, label=label, **style)
    left.set(xscale="log", xlabel="K, samples of each step", ylabel="ESS of the evidence, %", ylim=(0, 102))
    left.set_title(f"{steps} years of counts", fontsize=10)
    for name, by_number in found["snr"].items():
        numbers = [int(k) for k in by_number]
        right.plot(numbers, list(by_number.values()), "o-", color={"VIMCO-⋆": "C3", "VIMCO": "C0"}[name], label=name)
    right.set(xscale="log", xlabel="K", ylabel="SNR of one gradient")
    for axes in (left, right):
        axes.set_xticks(numbers, [str(k) for k in numbers])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(IMAGES / "chains.svg")


def draw_paths(number=5, steps=8):
    """Paths through samples of each step, as wide as their share of the evidence."""
    seen, rng = population_data(steps), np.random.default_rng(3)
    expected = seen + 14.0  # samples of independent steps, about what was seen and what was not
    samples = rng.poisson(expected[:, None], (steps, number))
    log_q = poisson.logpmf(samples, expected[:, None])
    log_v = np.stack([np.broadcast_to(poisson.logpmf(samples[0], INITIAL)[:, None], (number, number))])
    moves = poisson.logpmf(samples[1:, :, None], GROWTH * samples[:-1, None, :] + 1.0)  # now, before
    log_v = np.concatenate([log_v, moves]) + (binom.logpmf(seen[:, None], samples, DETECTION) - log_q)[..., None]
    share = np.asarray(path_shares(jnp.asarray(np.moveaxis(log_v, 0, 1)), False)[1])  # now, steps, before
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    for t in range(1, steps):
        for now in range(number):
            for before in range(number):
                line = [samples[t - 1, before], samples[t, now]]
                axes.plot([t, t + 1], line, "0.8", lw=0.6, zorder=1)
                axes.plot([t, t + 1], line, "C3", lw=8 * share[now, t, before], solid_capstyle="round", zorder=2)
    through = share.sum(2).T  # steps, now
    years = np.repeat(np.arange(1, steps + 1), number)
    axes.scatter(years, samples.ravel(), s=15 + 120 * through.ravel(), color="C3", edgecolor="white", zorder=3)
    axes.set(xlabel="year", ylabel="animals")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(IMAGES / "paths.svg")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps-in-time", type=int, default=100)
    parser.add_argument("--samples", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="others are as in chains.json")
    parser.add_argument(
        "--ratios", action="store_true", help="signal-to-noise ratios, without `--methods VIMCO-⋆ VIMCO` too"
    )
    args = parser.parse_args()
    draw_paths()
    data = population_data(args.steps_in_time)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"ess": {}, "snr": {}}
    found = compare(data, args.methods, args.samples, args.seeds)
    results["ess"] |= {method: {str(number): ess for number, ess in of.items()} for method, of in found.items()}
    if args.ratios or SIGNALS.keys() <= set(args.methods):
        results["snr"] = ratios(data, args.samples)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, args.steps_in_time)
