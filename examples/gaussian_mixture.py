"""A Gaussian mixture with its assignments left in: local particles against joint weights, and the truth.

    python examples/gaussian_mixture.py

1,000 points in five clusters of known, unequal variance and unknown means. The assignments are sampled, by a guide
whose logits are affine in x, so that it matches no point exactly (the true logits are quadratic). With joint weights
one particle's weight is a product over 1,000 points; with `plate_particles` each point averages its own. Both
evaluate as many densities per step. The assignments can be summed out here, which gives the truth.
"""

import argparse
from functools import partial
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

from numpyro_vimco import VIMCOStar

WEIGHTS = jnp.array([0.1, 0.3, 0.2, 0.25, 0.15])
SCALES = jnp.array([0.4, 1.5, 0.6, 1.0, 0.5])
TRUE_MEANS = jnp.array([-7.0, -3.5, 0.0, 3.0, 6.0])


def model(x):
    with numpyro.plate("cluster", len(SCALES)):
        mean = numpyro.sample("mean", dist.Normal(0, 5))
    with numpyro.plate("data", len(x)):
        cluster = numpyro.sample("assignment", dist.Categorical(WEIGHTS))
        numpyro.sample("x", dist.Normal(mean[cluster], SCALES[cluster]), obs=x)


def guide(x):
    guide_of_means(x)
    slope = numpyro.param("slope", 0.3 * TRUE_MEANS)
    intercept = numpyro.param("intercept", jnp.zeros(len(SCALES)))
    with numpyro.plate("data", len(x)):
        numpyro.sample("assignment", dist.Categorical(logits=slope * x[:, None] + intercept))


def marginalized_model(x):
    """The same model with the assignments summed out."""
    with numpyro.plate("cluster", len(SCALES)):
        mean = numpyro.sample("mean", dist.Normal(0, 5))
    log_density = dist.Normal(mean, SCALES).log_prob(x[:, None]) + jnp.log(WEIGHTS)
    numpyro.factor("x", logsumexp(log_density, axis=1).sum())


def guide_of_means(x):
    loc = numpyro.param("loc", TRUE_MEANS + 0.3)
    width = numpyro.param("width", jnp.full(len(SCALES), 0.1), constraint=dist.constraints.positive)
    with numpyro.plate("cluster", len(SCALES)):
        numpyro.sample("mean", dist.Normal(loc, width))


def simulate(num_points, key):
    key_cluster, key_x = random.split(key)
    cluster = random.choice(key_cluster, len(SCALES), (num_points,), p=WEIGHTS)
    return TRUE_MEANS[cluster] + SCALES[cluster] * random.normal(key_x, (num_points,))


def fit(model, guide, objective, num_steps, x):
    """Parameters, and mean and standard error of the final bound in nats over 100 evaluations."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.03, num_steps))
    result = SVI(model, guide, optimizer, objective).run(random.key(1), num_steps, x, progress_bar=False)
    loss = partial(objective.loss, param_map=result.params, model=model, guide=guide)
    losses = jax.jit(lambda keys: jax.lax.map(lambda key: loss(key, x=x), keys))(random.split(random.key(2), 100))
    return result.params, -losses.mean(), losses.std() / 10


def plot(x, rows, path):
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1.2])
    top.hist(np.asarray(x), bins=80, color="0.75")
    top.set(ylabel="points", title="1,000 points in five clusters")
    for height, ((name, (params, *_)), marker) in enumerate(zip(rows.items(), "s^o")):
        width = 2 * np.asarray(params["width"])
        label = f"{name}" if height < 2 else f"{name} (truth)"
        bottom.errorbar(
            params["loc"],
            np.full(len(width), -height),
            xerr=width,
            fmt=marker,
            color=f"C{height}",
            capsize=4,
            label=label,
        )
    bottom.set(
        xlabel="x; below: cluster means, ± 2 standard deviations of the fitted guide", yticks=[], ylim=(-2.6, 0.6)
    )
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=100)


def main(args):
    x = simulate(1000, random.key(args.seed))
    objectives = {
        "joint weights, N = 64": VIMCOStar(num_particles=64),
        "local particles, 8 × 8": VIMCOStar(num_particles=8, plate_particles={"data": 8}),
    }
    rows = {name: fit(model, guide, objective, args.num_steps, x) for name, objective in objectives.items()}
    truth = fit(marginalized_model, guide_of_means, VIMCOStar(num_particles=256), args.num_steps, x)
    rows["assignments summed out"] = truth

    print(f"{'':>24} {'bound (nats)':>22} {'error of means':>15} {'of their widths':>16}")
    exact = truth[0]
    for name, (params, bound, error) in rows.items():
        means = np.abs(params["loc"] - exact["loc"]).max()
        widths = np.abs(params["width"] / exact["width"] - 1).max()
        print(f"{name:>24} {bound:14.2f} ± {error:5.2f} {means:15.3f} {widths:15.0%}")
    print("Errors are the largest over clusters, against the guide fitted with the assignments summed out.")
    args.output.mkdir(parents=True, exist_ok=True)
    plot(x, rows, args.output / "gaussian_mixture.png")
    print(f"Saved gaussian_mixture.png in {args.output}/")
    return [float(bound) for _, bound, _ in rows.values()]


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("output"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
