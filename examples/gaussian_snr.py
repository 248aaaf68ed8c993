"""Signal-to-noise ratio of gradients against the number of particles, on a Gaussian whose gradients are known.

    python examples/gaussian_snr.py             # 8 minutes on two busy cores
    python examples/gaussian_snr.py --quick     # seconds

The claim of Daudel et al. 2026 (arXiv 2602.01412): with more particles the signal-to-noise ratio (SNR) of VIMCO
vanishes like 1/√N, and that of VIMCO-⋆ grows like √N. Here for every estimator of the library, orders α of the bound
from importance-weighted (0) to ELBO (1), 1, 10 and 100 dimensions, and a guide near to the posterior or far from it.

All coordinates are alike, so that one number is measured: the gradient of a coordinate of the guide's location. Its
exact value is known (`exact_gradients`). The SNR is |exact value| / standard deviation, which a few thousand draws give
within a few per cent, where an estimated mean would drown in the noise of VIMCO. The mean of the draws is held against
the exact value instead: that is the bias, in standard errors.
"""

import argparse
import itertools
from pathlib import Path

import jax
from jax import random
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import scipy

from numpyro_vimco import REINFORCE, VIMCO, ImportanceWeightedELBO, VIMCOStar
from numpyro_vimco.control_variates import vimco_star_signal

POSTERIOR_VARIANCE = 0.8  # the guide's is 1: a little too wide
OFFSETS = {"near": 0.1, "far": 1.0}  # of the guide's location from the posterior's, in every coordinate
FIT_FROM = 64  # slopes are fitted for N from here on


def model(dimension):
    """Prior and likelihood of equal variance, x = 0 seen: the posterior is Normal(0, POSTERIOR_VARIANCE)."""
    scale = (2 * POSTERIOR_VARIANCE) ** 0.5
    with numpyro.plate("coordinate", dimension):
        z = numpyro.sample("z", dist.Normal(0, scale))
        numpyro.sample("x", dist.Normal(z, scale), obs=jnp.zeros(dimension))
    numpyro.factor("joint weights", 0.0)  # outside of the plate: else each coordinate has a bound of its own


def path_guide(dimension):
    loc = numpyro.param("loc", jnp.zeros(dimension))
    with numpyro.plate("coordinate", dimension):
        numpyro.sample("z", dist.Normal(loc, 1))


class ScoreNormal(dist.Normal):
    """A Normal whose samples carry no gradient, like those of a discrete distribution."""

    reparametrized_params = []


def score_guide(dimension):
    loc = numpyro.param("loc", jnp.zeros(dimension))
    with numpyro.plate("coordinate", dimension):
        numpyro.sample("z", ScoreNormal(loc, 1))


class BestConstant(ImportanceWeightedELBO):
    """VIMCO-⋆ with another constant c than the simple choice α, for 0 < α < 1.

    The variance is least for c = α Var_w(s) / Var(s), the variance of the score under the guide weighted by w^(1-α),
    over that under the guide. Here both are known: the weighted guide is Gaussian, of this precision.
    """

    def score_signal(self, log_weights):
        constant = self.alpha / (1 + (1 - self.alpha) * (1 / POSTERIOR_VARIANCE - 1))
        others = len(log_weights) - 1
        shift = jnp.log1p(self.alpha / others) - jnp.log1p(constant / others)
        return vimco_star_signal(log_weights, self.alpha) + shift / (1 - self.alpha)


ESTIMATORS = {
    "REINFORCE": (score_guide, REINFORCE),
    "VIMCO arithmetic": (score_guide, lambda *args: VIMCO(*args, baseline="arithmetic")),
    "VIMCO geometric": (score_guide, VIMCO),
    "VIMCO-⋆": (score_guide, VIMCOStar),
    "VIMCO-⋆, best constant": (score_guide, BestConstant),
    "plain pathwise": (path_guide, lambda *args: VIMCOStar(*args, doubly_reparameterized=False)),
    "doubly reparam.": (path_guide, VIMCOStar),
}
STYLES = {  # of the figure
    "REINFORCE": "k:x",
    "VIMCO arithmetic": "C1-.v",
    "VIMCO geometric": "C1--^",
    "VIMCO-⋆": "C0-o",
    "plain pathwise": "C3--s",
    "doubly reparam.": "C2-D",
}


def predicted_slopes(name, alpha):
    """Slopes of log SNR and log variance against log N, as N grows: design by leading terms, the paper's at α = 0."""
    if name == "REINFORCE":
        return (-1.5 if alpha == 0 else -0.5), 1.0
    if alpha == 0:
        return (0.5, -3.0) if name.startswith(("VIMCO-⋆", "doubly")) else (-0.5, -1.0)
    return 0.5, -1.0


def exact_gradients(dimension, alphas, num_particles, size, rng):
    """Gradient of the bound with respect to a coordinate of the guide's location, by (guide, α), and standard errors.

    With z = offset + ε, Stein's lemma turns it into E Σ_j r_j W_j (-offset/v + (1 - 1/v) mean(ε_j)), where
    r = α + (1-α) W and v is the posterior's variance. The log-weight needs no more than the sum of ε over
    coordinates and the sum of their squares: two random numbers per particle whatever the dimension.

    :param size: number of particles drawn in all.
    """
    precision, shape = 1 / POSTERIOR_VARIANCE, (size // num_particles, num_particles)
    total = dimension**0.5 * rng.standard_normal(shape, np.float32)
    squares = total**2 / dimension + 2 * rng.standard_gamma((dimension - 1) / 2, shape, np.float32)
    exact = {}
    for (guide, offset), alpha in itertools.product(OFFSETS.items(), alphas):
        log_weights = squares / 2 - precision / 2 * (squares + 2 * offset * total)
        shares = scipy.special.softmax((1 - alpha) * log_weights, axis=1)
        path = -offset * precision + (1 - precision) * total / dimension
        draws = np.sum((alpha + (1 - alpha) * shares) * shares * path, axis=1)
        error = draws.std(dtype=float) / len(draws) ** 0.5
        exact[guide, alpha] = (draws.mean(dtype=float), error) if alpha < 1 else (-offset * precision, 0.0)
    return exact


def gradient_moments(dimension, alphas, num_particles, num_draws, key):
    """Mean, its standard error, and standard deviation of the gradient of one coordinate, pooled over coordinates.

    :return: by (guide, α, estimator). One compiled program for all: compiling takes longer than running.
    """
    cases = [(alpha, name) for alpha in alphas for name in ESTIMATORS if "best" not in name or 0 < alpha < 1]
    batch = max(1, min(num_draws, 2**18 // (num_particles * dimension)))  # bounds the memory

    def gradient(key, loc, alpha, name):
        guide, estimator = ESTIMATORS[name]
        loss = estimator(alpha, num_particles).loss
        return -jax.grad(loss, argnums=1)(key, {"loc": loc}, model, guide, dimension)["loc"]

    @jax.jit
    def draw(keys, loc):
        return jax.lax.map(lambda key: [gradient(key, loc, *case) for case in cases], keys, batch_size=batch)

    moments = {}
    for guide, offset in OFFSETS.items():
        draws = draw(random.split(key, num_draws), jnp.full(dimension, offset))
        for case, values in zip(cases, np.asarray(draws, float)):
            of_draw = values.mean(1)
            moments[guide, *case] = of_draw.mean(), of_draw.std() / num_draws**0.5, values.var(0).mean() ** 0.5
    return moments


def measure(args):
    """A table of one row per dimension, number of particles, guide, α and estimator."""
    rows, rng = [], np.random.default_rng(args.seed)
    for dimension, num_particles in itertools.product(args.dimensions, args.num_particles):
        num_draws = int(np.clip(2**23 // (num_particles * dimension), 200, args.max_draws))
        key = random.fold_in(random.fold_in(random.key(args.seed), dimension), num_particles)
        moments = gradient_moments(dimension, args.alphas, num_particles, num_draws, key)
        exact = exact_gradients(dimension, args.alphas, num_particles, args.reference_size, rng)
        for (guide, alpha, name), (mean, error, deviation) in moments.items():
            value, value_error = exact[guide, alpha]
            bias = (mean - value) / np.hypot(error, value_error)
            numbers = (num_draws, value, mean, error, deviation**2, abs(value) / deviation, bias)
            rows.append((alpha, name, guide, dimension, num_particles, *numbers))
        print(f"dimension {dimension}, N = {num_particles}: {num_draws} draws", flush=True)
    numbers = ["draws", "exact", "mean", "error", "variance", "SNR", "bias in errors"]
    return pd.DataFrame(rows, columns=["α", "estimator", "guide", "dimension", "N", *numbers])


def slopes_of(table, quantity):
    """Least-squares slopes of the logarithm against log N beside theory: a row per α and estimator."""

    def slope(case):
        return np.polyfit(np.log(case["N"]), np.log(case[quantity]), 1)[0]

    cases = table[table["N"] >= FIT_FROM].groupby(["α", "estimator", "guide", "dimension"], sort=False)
    slopes = cases[["N", quantity]].apply(slope).unstack(["guide", "dimension"])
    column = ["SNR", "variance"].index(quantity)
    slopes.insert(0, ("theory", ""), [predicted_slopes(name, alpha)[column] for alpha, name in slopes.index])
    return slopes


def loss_of_simple_constant(table):
    """Variance of VIMCO-⋆ over that with the best constant."""
    table = table[(table["α"] > 0) & (table["α"] < 1)]
    variance = table.pivot(index=["α", "N"], columns=["estimator", "guide", "dimension"], values="variance")
    return variance["VIMCO-⋆"] / variance["VIMCO-⋆, best constant"]


def plot(table, args, path):
    panels = [(0.0, "near"), (0.0, "far"), (0.5, "near")]
    shape = len(panels), len(args.dimensions)
    figure = Figure(figsize=(4 * shape[1], 3 * shape[0]), layout="constrained")
    grid = figure.subplots(*shape, squeeze=False)
    for line, (alpha, guide) in zip(grid, panels):
        for axes, dimension in zip(line, args.dimensions):
            case = table[(table["α"] == alpha) & (table["guide"] == guide) & (table["dimension"] == dimension)]
            for name, style in STYLES.items():
                of_name = case[case["estimator"] == name]
                axes.loglog(of_name["N"], of_name["SNR"], style, ms=5, label=name)
            axes.set_title(f"α = {alpha:g}, {guide}, {dimension} dimension{'s' * (dimension > 1)}", fontsize="medium")
            axes.set_xticks(args.num_particles, [str(number) for number in args.num_particles], fontsize="small")
            axes.minorticks_off()
        line[0].set_ylabel("SNR of one coordinate")
    for axes in grid[-1]:
        axes.set_xlabel("particles N")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=80)


def main(args):
    table = measure(args)
    slopes = {quantity: slopes_of(table, quantity) for quantity in ("SNR", "variance")}
    for quantity, fitted in slopes.items():
        print(f"\nSlope of log {quantity} against log N, from N = {FIT_FROM}, by guide and dimension")
        print(fitted.to_string(float_format="%.2f"))
    bias = table["bias in errors"].abs()
    print(f"\nBias: {(bias > 2).mean():.1%} of {len(bias)} estimates are off by more than 2 standard errors", end="")
    print(f" (5 % by chance), the largest by {bias.max():.1f}")
    print("\nVariance of VIMCO-⋆ over that with the best constant")
    print(loss_of_simple_constant(table).to_string(float_format="%.3f"))

    args.output.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.output / "gaussian_snr.csv", index=False, float_format="%.6g")
    plot(table, args, args.output / "gaussian_snr.png")
    print(f"\nSaved gaussian_snr.csv and gaussian_snr.png in {args.output}/")
    return table, slopes


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 dimensions, two N, two α, fewer draws")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("output"))
    args = parser.parse_args(argv)
    args.dimensions = [5] if args.quick else [1, 10, 100]
    args.num_particles = [64, 512] if args.quick else [2, 16, 64, 256, 1024, 4096]
    args.alphas = [0.0, 0.5] if args.quick else [0.0, 0.2, 0.5, 1.0]
    args.max_draws = 800 if args.quick else 4000
    args.reference_size = 1_000_000 if args.quick else 8_000_000
    return args


if __name__ == "__main__":
    main(parse())
