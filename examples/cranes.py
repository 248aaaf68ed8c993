"""How many whooping cranes were there? A population counted each winter, and a forecast held against later counts.

    python examples/cranes.py

In 1938 the last wild flock of whooping cranes (Grus americana) had 18 birds. It is counted each winter, where it stays
at Aransas in Texas. The number that is alive is latent and discrete: Poisson, with a mean in proportion to the winter
before. A flight finds about 95% of the flock. The model is fitted to the winters from 1938 to 1998, with K samples of
each winter of which all paths count, and forecasts the nine winters after that, which it has not seen.

Data: winter peak counts, U.S. Fish and Wildlife Service (1994), Whooping Crane Recovery Plan, table 1, and later
reports of the Service, as in the file cranes.txt of github.com/AspiringSeagull/MAT8406. The share that a flight finds:
T. Stehn, U.S. Fish and Wildlife Service.
"""

import argparse
from pathlib import Path

from jax import random
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np
import numpyro
from numpyro.contrib.control_flow import scan
import numpyro.distributions as dist
from numpyro.infer import SVI
import optax

from numpyro_vimco import AutoMixed, VIMCOStar, fit

FIRST_WINTER = 1938
# fmt: off
SEEN = np.array([
    18, 22, 26, 16, 19, 21, 18, 22, 25, 31, 30, 34, 31, 25, 21, 24, 21, 28, 24, 26, 32, 33, 36, 39, 32, 33, 42, 44, 43,
    48, 50, 56, 57, 59, 51, 49, 49, 57, 69, 72, 75, 76, 78, 73, 73, 75, 86, 97, 110, 134, 138, 146, 146, 132, 136, 143,
    133, 158, 160, 182, 183,
])
LATER = np.array([185, 177, 174, 185, 194, 216, 218, 237, 266])  # 1999 to 2007
# fmt: on


def model(winters, seen=None):
    growth = numpyro.sample("growth", dist.LogNormal(0.0, 0.2))
    found = numpyro.sample("found", dist.Beta(38, 2))
    first = numpyro.sample("first", dist.LogNormal(3.0, 0.5))

    def winter(expected, seen):
        alive = numpyro.sample("alive", dist.Poisson(expected))
        numpyro.sample("seen", dist.Binomial(alive, found), obs=seen)
        return growth * alive, None

    scan(winter, first, seen, length=winters)


guide = AutoMixed(model, chains={"alive"})


def plot(alive, forecast, path):
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    winters = FIRST_WINTER + np.arange(len(SEEN) + len(LATER))
    fitted, later = winters[: len(SEEN)], winters[len(SEEN) :]
    shown = slice(20, 36)
    left.plot(fitted[shown], alive[:60, shown].T, "C0-", lw=0.5, alpha=0.4)
    left.plot(fitted[shown], SEEN[shown], "k.", ms=7, label="seen")
    left.plot([], [], "C0-", lw=0.8, label="alive, 60 draws of the posterior")
    left.set(xlabel="winter", title="whooping cranes at Aransas")
    left.legend()
    for years, values, color, label in (
        (fitted, alive, "C0", "alive, 90% interval"),
        (later, forecast, "C1", "forecast of what is seen, 90% interval"),
    ):
        right.fill_between(years, *np.quantile(values, [0.05, 0.95], axis=0), color=color, alpha=0.4, lw=0, label=label)
    right.plot(fitted, SEEN, "k.", ms=4, label="seen")
    right.plot(later, LATER, "kx", ms=5, label="seen, not used")
    right.set(xlabel="winter", title="all winters, and a forecast")
    right.legend(loc="upper left")
    figure.savefig(path, dpi=100)


def main(args):
    objective = VIMCOStar(0.5, num_particles=8, chain_particles={"alive": args.num_samples})
    # Held while the likelihood is tempered, then a cosine.
    rate = optax.warmup_cosine_decay_schedule(0.02, 0.02, args.num_steps // 2, args.num_steps)
    svi = SVI(model, guide, optax.adam(rate), objective)
    posterior = fit(svi, random.key(args.seed), args.num_steps, len(SEEN), jnp.asarray(SEEN), progress_bar=False)
    print(posterior)
    draws = posterior.to_arviz(num_samples=1000, groups=(), progress_bar=False)["posterior"]
    for name in ("growth", "found"):
        print(f"{name}: {float(draws[name].mean()):.3f} ± {float(draws[name].std()):.3f}")
    forecast = posterior.predict(random.key(args.seed + 1), len(SEEN) + len(LATER))["seen"][:, len(SEEN) :]
    low, high = np.quantile(forecast, [0.05, 0.95], axis=0)
    print("\nForecast of what is seen, 90% interval, and what was seen")
    for i, seen in enumerate(LATER):
        print(f"{FIRST_WINTER + len(SEEN) + i} {low[i]:6.0f} {high[i]:4.0f} {seen:6}")
    args.output.mkdir(parents=True, exist_ok=True)
    plot(draws["alive"].values.reshape(-1, len(SEEN)), forecast, args.output / "cranes.png")
    print(f"Saved cranes.png in {args.output}/")
    return posterior, draws, forecast


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-steps", type=int, default=6000)
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("output"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
