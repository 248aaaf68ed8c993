"""Variable selection in a mixture: which features tell two groups apart, if nobody says who is in which.

    python examples/mixture_selection.py

100 individuals have 10 features. An individual belongs to one of two groups, which is not known, and some features are
higher in the second group. Assignments are summed out inside of each particle's weight, so that only the indicators of
the features (1,024 models) and the share of the second group are left to the guide. A sum over all models and a grid of
shares gives exact inclusion probabilities, probabilities of assignments, and evidence.
"""

import argparse
import itertools
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

from numpyro_vimco import AutoMixed, VIMCOStar, fit

INDIVIDUALS, FEATURES, DIFFERENCE = 100, 10, 0.7
SHARE, RELEVANT = 0.4, (0, 3, 6)


def model(x):
    """``x`` has shape (individuals, features)."""
    with numpyro.plate("feature", x.shape[1]):
        included = numpyro.sample("included", dist.Bernoulli(0.3))
    share = numpyro.sample("share", dist.Beta(2.0, 2.0))
    with numpyro.plate("individual", len(x)):
        group = numpyro.sample("group", dist.Bernoulli(share), infer={"enumerate": "parallel"})
        mean = group[..., None] * included * DIFFERENCE
        numpyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)


def exact_posterior(x, grid):
    """Log evidence, inclusion probabilities and probabilities of the second group, by sums over all models."""
    models = jnp.array(list(itertools.product([0, 1], repeat=x.shape[1])))
    shares = (jnp.arange(grid) + 0.5) / grid
    prior = dist.Beta(2.0, 2.0).log_prob(shares) - jnp.log(grid)

    def of_model(included):
        first = dist.Normal(0.0, 1.0).log_prob(x).sum(1)
        second = dist.Normal(included * DIFFERENCE, 1.0).log_prob(x).sum(1)
        both = jnp.stack([jnp.log1p(-shares)[:, None] + first, jnp.log(shares)[:, None] + second])
        log_joint = prior + logsumexp(both, 0).sum(1) + dist.Bernoulli(0.3).log_prob(included).sum()
        total = logsumexp(log_joint)
        return total, jnp.exp(log_joint - total) @ jnp.exp(both[1] - logsumexp(both, 0))

    totals, groups = jax.lax.map(of_model, models, batch_size=64)
    log_evidence = logsumexp(totals)
    weights = jnp.exp(totals - log_evidence)
    return float(log_evidence), np.asarray(weights @ models), np.asarray(weights @ groups)


def simulate(key):
    key_group, key_x = random.split(key)
    group = random.bernoulli(key_group, SHARE, (INDIVIDUALS,))
    relevant = jnp.isin(jnp.arange(FEATURES), jnp.array(RELEVANT))
    return group[:, None] * relevant * DIFFERENCE + random.normal(key_x, (INDIVIDUALS, FEATURES))


def plot(inclusion, exact_inclusion, group, exact_group, path):
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    position = np.arange(len(inclusion))
    left.bar(position - 0.2, exact_inclusion, 0.4, color="0.6", label="exact (1,024 models)")
    left.bar(position + 0.2, inclusion, 0.4, color="C0", label="VIMCOStar, weighted")
    left.set(xlabel="feature", ylabel="inclusion probability", xticks=position, ylim=(0, 1.15))
    left.legend(ncols=2, fontsize="small")
    right.plot([0, 1], [0, 1], "k--", lw=1)
    right.plot(exact_group, group, "C0.")
    right.set(xlabel="exact", ylabel="VIMCOStar, weighted", title="probability of the second group")
    figure.savefig(path, dpi=100)


def main(args):
    x = simulate(random.key(args.seed))
    log_evidence, exact_inclusion, exact_group = exact_posterior(x, args.grid)
    svi = SVI(
        model, AutoMixed(model), optax.adam(optax.cosine_decay_schedule(0.02, args.num_steps)), VIMCOStar(0.5, 32)
    )
    posterior = fit(svi, random.key(1), args.num_steps, x, num_starts=2, progress_bar=False)
    posterior.diagnose(args.num_draws, random.key(2))
    tree = posterior.to_arviz(rng_key=random.key(3), num_samples=args.num_draws // 4, num_proposals=args.num_draws)
    print(posterior, f"\nexact log evidence {log_evidence:.3f}\n\n{'feature':>8} {'included':>9} {'exact':>7}")
    inclusion, group = (tree["posterior"][name].values.mean((0, 1)) for name in ("included", "group"))
    for i, (here, exact) in enumerate(zip(inclusion, exact_inclusion)):
        print(f"{i:8} {here:9.3f} {exact:7.3f}")
    errors = np.abs(inclusion - exact_inclusion).max(), np.abs(group - exact_group).max()
    print(f"\nlargest error of an inclusion probability {errors[0]:.3f}, of the probability of a group {errors[1]:.3f}")
    args.output.mkdir(parents=True, exist_ok=True)
    plot(inclusion, exact_inclusion, group, exact_group, args.output / "mixture_selection.png")
    print(f"Saved mixture_selection.png in {args.output}/")
    return posterior, log_evidence, errors


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-steps", type=int, default=1000)
    parser.add_argument("--num-draws", type=int, default=8000, help="draws of the guide to be weighted")
    parser.add_argument("--grid", type=int, default=50, help="grid points of the share for the exact posterior")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("output"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
