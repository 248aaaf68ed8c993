"""Which way do turtles walk? A circular latent with two modes, by a guide that is a mixture of von Mises distributions.

    python examples/turtles.py

Of 76 turtles most took one direction after a treatment, some the opposite one: directions are von Mises around an
angle, or around the angle opposite to it. The angle is known up to half a turn only, since
"most go there" and "few go there" are both possible: its posterior has two modes, on a circle. Neither a mixture nor a
von Mises distribution has a reparameterised sampler; here the mixture is a site like any other, and the concentration
and the share of turtles, which depend on it, take doubly reparameterised gradients. The truth is a sum over a grid.

Data: M. A. Stephens (1969), Techniques for directional data, Stanford University, technical report 150; as in
N. I. Fisher (1993), Statistical Analysis of Circular Data, Cambridge University Press, appendix B3.
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
from scipy.special import expit, i0e, logsumexp, softmax

from numpyro_vimco import Posterior, VIMCOStar

# fmt: off
DEGREES = np.array([
    8, 9, 13, 13, 14, 18, 22, 27, 30, 34, 38, 38, 40, 44, 45, 47, 48, 48, 48, 48, 50, 53, 56, 57, 58, 58, 61, 63, 64,
    64, 64, 65, 65, 68, 70, 73, 78, 78, 78, 83, 83, 88, 88, 88, 90, 92, 92, 93, 95, 96, 98, 100, 103, 106, 113, 118,
    138, 153, 153, 155, 204, 215, 223, 226, 237, 238, 243, 244, 250, 251, 257, 268, 285, 319, 343, 350,
])
# fmt: on


def model(angles):
    direction = numpyro.sample("direction", dist.Uniform(-jnp.pi, jnp.pi))
    log_concentration = numpyro.sample("log_concentration", dist.Normal(0, 1))
    logit_share = numpyro.sample("logit_share", dist.Logistic(0, 1))  # of the turtles that go there: uniform
    ways = dist.Categorical(logits=jnp.stack([logit_share, jnp.zeros_like(logit_share)]))
    there_and_back = dist.VonMises(direction + jnp.array([0, jnp.pi]), jnp.exp(log_concentration))
    with numpyro.plate("turtle", len(angles)):
        numpyro.sample("angle", dist.MixtureSameFamily(ways, there_and_back), obs=angles)


def guide(angles):
    axis = numpyro.param("axis", 0.3)
    width = numpyro.param("width", 0.5, constraint=dist.constraints.positive)
    modes = dist.VonMises(axis + jnp.array([0, jnp.pi]), 1 / width**2)
    weights = dist.Categorical(logits=numpyro.param("logits", jnp.array([0.1, -0.1])))
    direction = numpyro.sample("direction", dist.MixtureSameFamily(weights, modes))
    which = jnp.cos(direction - axis)  # about 1 at the first mode, -1 at the second
    loc, slope = numpyro.param("share_loc", 0.0), numpyro.param("share_slope", 0.0)
    scale = numpyro.param("scale", jnp.array([0.3, 0.3]), constraint=dist.constraints.positive)
    numpyro.sample("logit_share", dist.Normal(loc + slope * which, scale[0]))
    numpyro.sample("log_concentration", dist.Normal(numpyro.param("concentration_loc", 0.0), scale[1]))


def exact_posterior(angles, size):
    """Log evidence, a grid of directions, and the posterior's density and mean share on it."""
    direction = np.linspace(-np.pi, np.pi, 4 * size, endpoint=False)
    log_concentration, logit_share = np.linspace(-2, 3, size), np.linspace(-6, 6, size)
    cosine = np.cos(angles - direction[:, None])
    share = expit(logit_share)
    log_joint = np.empty((len(direction), size, size))
    for i, kappa in enumerate(np.exp(log_concentration)):
        there, back = np.exp(kappa * (cosine - 1)), np.exp(kappa * (-cosine - 1))  # over 2π i0e(kappa)
        density = share[:, None, None] * there + (1 - share)[:, None, None] * back
        log_joint[:, i] = np.log(density).sum(-1).T - len(angles) * np.log(2 * np.pi * i0e(kappa))
    log_joint += -0.5 * log_concentration[:, None] ** 2 - 0.5 * np.log(2 * np.pi) - np.log(2 * np.pi)
    log_joint += np.log(share * (1 - share))  # the logistic prior
    cell = np.prod([grid[1] - grid[0] for grid in (direction, log_concentration, logit_share)])
    log_evidence = logsumexp(log_joint) + np.log(cell)
    posterior = np.exp(log_joint - log_evidence).sum(1) * cell
    step = direction[1] - direction[0]
    return log_evidence, direction, posterior.sum(-1) / step, posterior @ share / posterior.sum(-1)


def plot(angles, direction, density, edges, estimate, path):
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left = figure.add_subplot(1, 2, 1, projection="polar")
    left.set(theta_zero_location="N", theta_direction=-1)
    left.hist(angles, bins=np.radians(np.arange(-180, 181, 15)), color="0.7", edgecolor="white")
    left.set_title("directions of 76 turtles")
    right = figure.add_subplot(1, 2, 2)
    right.bar(np.degrees(edges[:-1]), estimate, np.degrees(np.diff(edges)), align="edge", color="C0", label="VIMCOStar")
    right.plot(np.degrees(direction), density, "k--", lw=1.2, label="exact")
    right.set(
        title="posterior of the angle",
        xlabel="angle (degrees)",
        ylabel="density (per radian)",
        xticks=range(-180, 181, 60),
    )
    right.legend()
    figure.savefig(path, dpi=100)


def main(args):
    angles = np.radians((DEGREES + 180) % 360 - 180)  # in [-π, π), the support of NumPyro's von Mises
    svi = SVI(model, guide, optax.adam(0.01), VIMCOStar(num_particles=32))
    result = svi.run(random.key(args.seed), args.num_steps, jnp.asarray(angles), progress_bar=False)
    posterior = Posterior(svi, result, jnp.asarray(angles))
    posterior.diagnose(args.num_draws, random.key(1))
    tree = posterior.to_arviz(rng_key=random.key(1), num_samples=args.num_draws, resample=False, groups=())
    weights = softmax(tree["sample_stats"]["log_weight"].values[0])
    drawn = {name: values.values[0] for name, values in tree["posterior"].items()}

    log_evidence, direction, density, share = exact_posterior(angles, args.grid)
    estimate, edges = np.histogram(drawn["direction"], 120, (-np.pi, np.pi), weights=weights, density=True)
    first = np.cos(drawn["direction"] - np.radians(64)) > 0
    of_first = np.cos(direction - np.radians(64)) > 0
    of_mode = lambda values, which, by: np.sum(values[which] * by[which]) / np.sum(by[which])  # noqa: E731
    found = {
        "probability of the mode at 64°": (weights[first].sum(), density[of_first].sum() / density.sum()),
        "its angle (degrees)": np.degrees(
            [of_mode(drawn["direction"], first, weights), of_mode(direction, of_first, density)]
        ),
        "share of turtles that go there": (
            of_mode(expit(drawn["logit_share"]), first, weights),
            of_mode(share, of_first, density),
        ),
    }
    print(f"{posterior}\nexact log evidence (nats) {log_evidence:.3f}\n\n{'':>32} {'weighted':>9} {'exact':>9}")
    for name, (weighted, exact) in found.items():
        print(f"{name:>32} {weighted:9.3f} {exact:9.3f}")
    args.output.mkdir(parents=True, exist_ok=True)
    plot(angles, direction, density, edges, estimate, args.output / "turtles.png")
    print(f"Saved turtles.png in {args.output}/")
    return float(posterior.log_evidence - log_evidence), found


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-steps", type=int, default=3000)
    parser.add_argument("--grid", type=int, default=100, help="grid points of each parameter for the exact posterior")
    parser.add_argument("--num-draws", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("output"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
