"""When did British coal mining become safer? A discrete change point, with a guide of one line.

    python examples/coal_mining.py

Yearly numbers of disasters in British coal mines that killed ten or more, 1851 to 1962, as a Poisson process whose
rate changes once. The year of the change is discrete with 111 values, the two rates are continuous, and what they are
depends on the year. With exponential priors the rates can be integrated out: the exact posterior of the year by
enumeration, against which the importance-weighted one is held.

Data: R. G. Jarrett (1979), A note on the intervals between coal-mining disasters, Biometrika 66, 191-193, counted by
year as in B. P. Carlin, A. E. Gelfand and A. F. M. Smith (1992), Hierarchical Bayesian analysis of changepoint
problems, Applied Statistics 41, 389-405. (Copies in use differ in 1941 and 1942: 4 and 2, or 3 and 3.)
"""

import argparse
from pathlib import Path

from jax import random
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI
import optax
from scipy.special import gammaln, logsumexp, softmax

from numpyro_vimco import AutoMixed, Posterior, VIMCOStar

FIRST_YEAR = 1851
# fmt: off
DISASTERS = np.array([
    4, 5, 4, 1, 0, 4, 3, 4, 0, 6, 3, 3, 4, 0, 2, 6, 3, 3, 5, 4, 5, 3, 1, 4, 4, 1, 5, 5, 3, 4, 2, 5, 2, 2, 3, 4, 2, 1,
    3, 2, 2, 1, 1, 1, 1, 3, 0, 0, 1, 0, 1, 1, 0, 0, 3, 1, 0, 3, 2, 2, 0, 1, 1, 1, 0, 1, 0, 1, 0, 0, 0, 2, 1, 0, 0, 0,
    1, 1, 0, 2, 3, 3, 1, 1, 2, 1, 1, 1, 1, 2, 4, 2, 0, 0, 0, 1, 4, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 1,
])
# fmt: on


def model(disasters):
    change = numpyro.sample("change", dist.DiscreteUniform(1, len(disasters) - 1))  # years before it
    early = numpyro.sample("early", dist.Exponential(1.0))
    late = numpyro.sample("late", dist.Exponential(1.0))
    with numpyro.plate("year", len(disasters)):
        rate = jnp.where(jnp.arange(len(disasters)) < change, early, late)
        numpyro.sample("disasters", dist.Poisson(rate), obs=disasters)


guide = AutoMixed(model, structure="conditional")


def exact_posterior(disasters):
    """Log evidence, and the probability of each number of years before the change."""
    change = np.arange(1, len(disasters))
    before = disasters.cumsum()[:-1]

    def log_evidence(total, years):  # of one rate: ∫ Poisson(counts; rate) Exponential(rate; 1) without the factorials
        return gammaln(total + 1) - (total + 1) * np.log(years + 1)

    log_joint = (
        log_evidence(before, change)
        + log_evidence(disasters.sum() - before, len(disasters) - change)
        - gammaln(disasters + 1).sum()
        - np.log(len(change))
    )
    return logsumexp(log_joint), np.exp(log_joint - logsumexp(log_joint))


def plot(rate, years, estimate, exact, path):
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    of_counts = FIRST_YEAR + np.arange(len(DISASTERS))
    left.bar(of_counts, DISASTERS, color="0.75", label="disasters in a year")
    left.plot(of_counts, rate, "C0-", lw=2, label="posterior mean of the rate")
    left.set(xlabel="year", title="disasters that killed ten or more")
    left.legend()
    shown = exact > 1e-3
    right.bar(years[shown], estimate[shown], color="C0", label="VIMCOStar, importance-weighted")
    right.plot(years[shown], exact[shown], "k_", ms=11, label="exact, by enumeration")
    right.set(xlabel="first year of the late rate", ylabel="posterior probability", title="when it became safer")
    right.margins(y=0.3)
    right.legend()
    figure.savefig(path, dpi=100)


def main(args):
    disasters = jnp.asarray(DISASTERS)
    objective = VIMCOStar(num_particles=args.num_particles)
    svi = SVI(model, guide, optax.adam(0.02), objective)
    result = svi.run(random.key(args.seed), args.num_steps, disasters)

    posterior = Posterior(svi, result, disasters)
    posterior.diagnose(args.num_draws, random.key(2))
    tree = posterior.to_arviz(rng_key=random.key(2), num_samples=args.num_draws, resample=False, groups=())
    draws = {name: values.values[0] for name, values in tree["posterior"].items()}
    weights = softmax(tree["sample_stats"]["log_weight"].values[0])
    log_evidence, exact = exact_posterior(DISASTERS)
    estimate = np.bincount(draws["change"], weights, len(DISASTERS))[1:]
    variation = 0.5 * np.abs(estimate - exact).sum()

    years = FIRST_YEAR + np.arange(1, len(DISASTERS))
    print(f"\n{posterior}\n\nFirst year of the late rate, by {len(weights):,} importance-weighted draws")
    print(f"{'year':>6} {'weighted':>9} {'exact':>7}")
    for i in np.sort(np.argsort(exact)[-10:]):
        print(f"{years[i]:6} {estimate[i]:9.3f} {exact[i]:7.3f}")
    print(f"total variation {variation:.4f}")
    print(f"disasters a year: {weights @ draws['early']:.2f} before, {weights @ draws['late']:.2f} after")
    print(f"exact log evidence (nats) {log_evidence:.3f}")
    change = np.arange(len(DISASTERS))[:, None] >= draws["change"]  # of shape (years, draws)
    rate = np.where(change, draws["late"], draws["early"]) @ weights
    args.output.mkdir(parents=True, exist_ok=True)
    plot(rate, years, estimate, exact, args.output / "coal_mining.png")
    print(f"Saved coal_mining.png in {args.output}/")
    return variation, posterior.log_evidence - log_evidence


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-steps", type=int, default=3000)
    parser.add_argument("--num-particles", type=int, default=64)
    parser.add_argument("--num-draws", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("output"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
