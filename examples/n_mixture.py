"""N-mixture model of animal abundance: latent counts with particles of their own, against the truth.

    python examples/n_mixture.py

200 sites are visited three times; a site holds a Poisson number of animals, each seen at a visit with the same
probability. The counts that are there are latent and discrete, one per site, beside two global parameters. Summed
out up to 100, they give the exact posterior of the parameters on a grid.
"""

import argparse
from pathlib import Path

import jax
from jax import random
from jax.nn import logsumexp
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI
import optax
from scipy.special import expit
from scipy.stats import binom, norm, poisson

from numpyro_vimco import Posterior, VIMCOStar

SITES, VISITS, ABUNDANCE, DETECTION = 200, 3, 5.0, 0.4
LOG_ABUNDANCE_PRIOR, LOGIT_DETECTION_PRIOR = (1.0, 1.0), (0.0, 1.5)


def model(seen):
    """``seen`` has shape (visits, sites)."""
    logit_detection = numpyro.sample("logit_detection", dist.Normal(*LOGIT_DETECTION_PRIOR))
    log_abundance = numpyro.sample("log_abundance", dist.Normal(*LOG_ABUNDANCE_PRIOR))
    with numpyro.plate("site", seen.shape[1], dim=-1):
        count = numpyro.sample("count", dist.Poisson(jnp.exp(log_abundance)))
        with numpyro.plate("visit", seen.shape[0], dim=-2):
            numpyro.sample("seen", dist.Binomial(count, logits=logit_detection), obs=seen)


def guide(seen):
    """Correlated parameters; at each site at least what was seen at once, and a Poisson number more."""
    positive = dist.constraints.positive
    logit_width = numpyro.param("logit_width", 0.1, constraint=positive)
    logit_detection = numpyro.sample("logit_detection", dist.Normal(numpyro.param("logit_loc", 0.0), logit_width))
    log_loc = numpyro.param("log_loc", 1.0) + numpyro.param("log_slope", 0.0) * logit_detection
    log_width = numpyro.param("log_width", 0.1, constraint=positive)
    log_abundance = numpyro.sample("log_abundance", dist.Normal(log_loc, log_width))

    most, mean = seen.max(0), seen.mean(0)
    coefficients = numpyro.param("coefficients", jnp.array([-1.0, 0.0, 0.0, 1.0, -1.0]))
    with numpyro.plate("site", seen.shape[1], dim=-1):
        features = jnp.stack([jnp.ones_like(mean), mean, most, 0 * mean + log_abundance, 0 * mean + logit_detection])
        more = dist.Poisson(jnp.exp(coefficients @ features))
        numpyro.sample("count", dist.TransformedDistribution(more, dist.transforms.AffineTransform(most, 1.0)))


def simulate(key):
    key_count, key_seen = random.split(key)
    count = random.poisson(key_count, ABUNDANCE, (SITES,))
    return dist.Binomial(count, DETECTION).sample(key_seen, (VISITS,)).astype(jnp.float32)


def exact_posterior(seen, size=120):
    """Log evidence, posterior means of abundance and detection, and the posterior on a grid; counts up to 100."""
    seen, counts = np.asarray(seen), np.arange(101)
    log_abundance, logit_detection = np.linspace(1.0, 3.0, size), np.linspace(-2.0, 0.8, size)
    detection = 1 / (1 + np.exp(-logit_detection))
    # log p(seen | count), of shape (grid, counts, sites), by the distinct values of what was seen
    log_seen = np.sum(binom.logpmf(seen[:, None, None, :], counts[:, None], detection[:, None, None]), axis=0)
    log_count = poisson.logpmf(counts, np.exp(log_abundance)[:, None])
    log_likelihood = np.array([logsumexp(row[None, :, :] + log_count[:, :, None], axis=1).sum(-1) for row in log_seen])
    log_joint = log_likelihood + norm.logpdf(logit_detection, *LOGIT_DETECTION_PRIOR)[:, None]
    log_joint += norm.logpdf(log_abundance, *LOG_ABUNDANCE_PRIOR)
    cell = (log_abundance[1] - log_abundance[0]) * (logit_detection[1] - logit_detection[0])
    log_evidence = np.logaddexp.reduce(log_joint, axis=None)
    posterior = np.exp(log_joint - log_evidence)
    means = posterior.sum(0) @ np.exp(log_abundance), posterior.sum(1) @ detection
    return log_evidence + np.log(cell), means, (np.exp(log_abundance), detection, posterior)


def fit(objective, num_steps, num_draws, seen):
    """Final bound in nats with its standard error, draws of abundance and detection, and their ESS per proposal."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, num_steps))
    svi = SVI(model, guide, optimizer, objective)
    result = svi.run(random.key(1), num_steps, seen, progress_bar=False)
    evaluate = jax.jit(lambda key: objective.loss(key, result.params, model, guide, seen))
    losses = jax.lax.map(evaluate, random.split(random.key(2), 200))
    posterior = Posterior(svi, result, seen)
    tree = posterior.to_arviz(rng_key=random.key(3), num_samples=num_draws, groups=(), progress_bar=False)
    found = tree["posterior"]
    draws = np.exp(found["log_abundance"].values[0]), expit(found["logit_detection"].values[0])
    ess = found.attrs["ess"] / found.attrs["num_proposals"]
    return -losses.mean(), losses.std() / len(losses) ** 0.5, np.stack(draws), ess


def plot(grid, exact, draws, path):
    abundance, detection, posterior = grid
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, (name, (x, y)) in zip(figure.subplots(1, 2, sharey=True), draws.items()):
        axes.plot(x[:3000], y[:3000], "C0.", ms=2, alpha=0.4, label="importance-weighted draws")
        axes.contour(abundance, detection, posterior, colors="black", linewidths=1)
        axes.plot(*exact, "kX", ms=13, mec="white", label="exact mean (lines: exact density)")
        axes.plot(x.mean(), y.mean(), "C1o", ms=6, mec="white", label="their mean")
        axes.set(title=name, xlabel="animals per site", xlim=(3.5, 7), ylim=(0.25, 0.5))
        axes.legend()
    figure.axes[0].set_ylabel("probability of detection")
    figure.savefig(path, dpi=100)


def main(args):
    seen = simulate(random.key(args.seed))
    log_evidence, exact, grid = exact_posterior(seen, args.grid)
    objectives = {
        "joint weights, N = 64": VIMCOStar(num_particles=64),
        "local particles, 8 × 8": VIMCOStar(num_particles=8, plate_particles={"site": 8}),
    }
    print(f"{'':>24} {'bound (nats)':>22} {'ESS':>6} {'abundance':>10} {'error':>7} {'detection':>10} {'error':>7}")
    results, drawn = [], {}
    for name, objective in objectives.items():
        bound, error, drawn[name], ess = fit(objective, args.num_steps, args.num_draws, seen)
        means = drawn[name].mean(1)
        errors = means - exact
        results.append((float(bound), *errors))
        columns = f"{ess:6.1%} {means[0]:10.3f} {errors[0]:+7.3f} {means[1]:10.4f} {errors[1]:+7.4f}"
        print(f"{name:>24} {bound:14.2f} ± {error:5.2f} {columns}")
    print(f"{'exact':>24} {log_evidence:14.2f} {'':14} {exact[0]:10.3f} {'':7} {exact[1]:10.4f}")
    print("Abundance and detection are posterior means, from importance-weighted draws.")
    args.output.mkdir(parents=True, exist_ok=True)
    plot(grid, exact, drawn, args.output / "n_mixture.png")
    print(f"Saved n_mixture.png in {args.output}/")
    return float(log_evidence), results


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-steps", type=int, default=4000)
    parser.add_argument("--num-draws", type=int, default=10_000, help="posterior draws, from four proposals each")
    parser.add_argument("--grid", type=int, default=120, help="grid points per parameter for the exact posterior")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("output"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
