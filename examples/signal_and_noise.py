"""Why the signal-to-noise ratio of VIMCO falls with more particles, and that of VIMCO-⋆ rises: one figure.

    python examples/signal_and_noise.py    # half a minute

The posterior is Normal of variance 0.8, the guide Normal(0.5, 1), whose samples are taken to carry no gradient. The
log-weights and score are known, so that an estimator is its signal and nothing else: the gradient is a sum over
particles of signal × score.
"""

import argparse
from pathlib import Path

import jax
from jax import random
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np

from numpyro_vimco.control_variates import path_factor, vimco_arithmetic_signal, vimco_star_signal

OFFSET, VARIANCE = 0.5, 0.8  # of the guide's location from the posterior's, whose variance is not the guide's
SIGNALS = {"VIMCO": vimco_arithmetic_signal, "VIMCO-⋆": vimco_star_signal}
STYLES = {"VIMCO": "C1--^", "VIMCO-⋆": "C0-o"}


def gradients(num_particles, num_draws, key):
    """Draws of the gradient of the bound with respect to the guide's location, by estimator, and its exact value.

    The exact value is the mean of as many doubly reparameterised gradients, whose noise is least.
    """

    def draw(key):
        score = random.normal(key, (num_particles,))
        z = OFFSET + score
        log_weights = -(z**2) / (2 * VARIANCE) + score**2 / 2  # up to a constant
        share = jax.nn.softmax(log_weights)
        exact = jnp.sum(path_factor(log_weights, 0.0) * share * (score - z / VARIANCE))
        return exact, {name: signal(log_weights, 0.0) @ score for name, signal in SIGNALS.items()}

    exact, draws = jax.jit(lambda keys: jax.lax.map(draw, keys, batch_size=500))(random.split(key, num_draws))
    return np.asarray(exact, float).mean(), {name: np.asarray(values, float) for name, values in draws.items()}


def plot(numbers, relative, snr, path):
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1.25, 1])

    n = 16
    share = np.linspace(0, 0.3, 200)
    left.plot(n * share, n * (-np.log1p(-share) - share - np.log1p(1 / (n - 1))), "C1--", lw=2, label="VIMCO")
    left.plot(n * share, n * (-np.log1p(-share) - share), "C0-", lw=2, label="VIMCO-⋆")
    left.axhline(0, color="0.6", lw=0.8)
    left.axvline(1, color="0.6", lw=0.8, ls=":")
    left.annotate("average particle", (0.95, 0.3), rotation=90, ha="right", color="0.4", fontsize="small")
    arrow = {"arrowstyle": "->", "color": "C1"}
    left.annotate("left over: -1/N", (0.1, -1.0), (1.2, -0.55), color="C1", arrowprops=arrow)
    left.set(title=f"signal of one particle, N = {n}", xlabel="its share of the weight, × N", ylabel="signal × N")
    left.legend(loc="lower right")

    for side, (name, hatch) in zip((-0.19, 0.19), (("VIMCO", "//"), ("VIMCO-⋆", None))):
        middle.boxplot(
            [relative[n][name] for n in numbers],
            positions=np.arange(len(numbers)) + side,
            widths=0.3,
            whis=(5, 95),
            showfliers=False,
            patch_artist=True,
            medianprops={"color": "black"},
            boxprops={"facecolor": STYLES[name][:2], "alpha": 0.7, "hatch": hatch},
        )
    middle.axhline(1, color="black", lw=1, ls=":")
    middle.set_yscale("symlog", linthresh=2)
    middle.set(
        title="gradient estimates (boxes: half of them, lines: 90 %)",
        xlabel="particles N",
        ylabel="estimate / exact value",
    )
    middle.set_xticks(range(len(numbers)), [str(n) for n in numbers])
    ticks = [-100, -10, -1, 0, 1, 10, 100]
    middle.set_yticks(ticks, [str(tick) for tick in ticks], minor=False)
    middle.minorticks_off()

    for name, values in snr.items():
        right.loglog(numbers, values, STYLES[name])
    right.set_xticks(numbers, [str(n) for n in numbers])
    right.minorticks_off()
    right.text(numbers[1], 1.8 * snr["VIMCO-⋆"][1], "VIMCO-⋆ ∝ √N", color="C0", ha="center")
    right.text(numbers[-2], 2.5 * snr["VIMCO"][-2], "VIMCO ∝ 1/√N", color="C1", ha="center")
    right.set(title="signal-to-noise ratio", xlabel="particles N", ylabel="|mean| / standard deviation")
    figure.savefig(path, dpi=110)


def main(args):
    relative = {}
    for n, key in zip(args.numbers, random.split(random.key(args.seed), len(args.numbers))):
        exact, draws = gradients(n, args.num_draws, key)
        relative[n] = {name: values / exact for name, values in draws.items()}
    snr = {name: [1 / relative[n][name].std() for n in args.numbers] for name in SIGNALS}
    print(f"{'SNR, N =':>10}" + "".join(f"{n:8}" for n in args.numbers))
    for name, values in snr.items():
        print(f"{name:>10}" + "".join(f"{value:8.3f}" for value in values))
    args.output.mkdir(parents=True, exist_ok=True)
    plot(args.numbers, relative, snr, args.output / "signal_and_noise.png")
    print(f"Saved signal_and_noise.png in {args.output}/")
    return snr


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-draws", type=int, default=20_000)
    parser.add_argument("--numbers", type=int, nargs="+", default=[4, 16, 64, 256, 1024], help="of particles")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("output"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
