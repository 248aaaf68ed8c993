"""Sigmoid belief networks on handwritten digits: what each estimator reaches in the same time.

    python examples/sigmoid_belief_network.py             # about 8 minutes
    python examples/sigmoid_belief_network.py --quick     # seconds

Binary units in one or two stochastic layers explain the 8 x 8 digits of scikit-learn, black and white here. Model and
guide are learned together; every digit has a bound of its own, since all sites are in one plate. Every objective
trains for the same wall-clock time, compilation not counted, with 5, 50 and 500 particles. All fits take turns, so
that whatever else the machine does falls on each alike. What counts is the bound on digits that were not seen in
training, with 1,000 particles whatever the fit had.
"""

import argparse
import itertools
from pathlib import Path
import time

import jax
from jax import random
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import replay, seed, substitute, trace
from numpyro.infer import SVI, TraceGraph_ELBO
import optax
import pandas as pd
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from numpyro_vimco import VIMCO, ReweightedWakeSleep, VIMCOStar

NETWORKS = {"1 layer": [32], "2 layers": [32, 16]}  # units from the bottom to the top
BATCH, TEST_PARTICLES = 32, 1000
OBJECTIVES = {"VIMCO-⋆": VIMCOStar, "VIMCO": VIMCO, "RWS": ReweightedWakeSleep, "TraceGraph_ELBO": TraceGraph_ELBO}


def linear(name, x, size):
    weight = numpyro.param(f"{name}.weight", lambda key: 0.1 * random.normal(key, (x.shape[-1], size)))
    return x @ weight + numpyro.param(f"{name}.bias", jnp.full(size, 0.1))


def layer(name, logits, obs=None):
    return numpyro.sample(name, dist.Bernoulli(logits=logits).to_event(1), obs=obs)


def model(x, units, batch=None):
    """Digits of shape (n, 64); ``batch`` of them at a time."""
    *below, top = units
    prior = numpyro.param("prior", jnp.full(top, 0.1))
    with numpyro.plate("digit", len(x), subsample_size=batch):
        x = numpyro.subsample(x, event_dim=1)
        h = layer(f"h{len(units)}", jnp.broadcast_to(prior, (len(x), top)))
        for level, size in reversed(list(enumerate(below, 1))):
            h = layer(f"h{level}", linear(f"model{level}", h, size))
        layer("x", linear("model0", h, x.shape[-1]), obs=x)


def guide(x, units, batch=None):
    with numpyro.plate("digit", len(x), subsample_size=batch):
        h = numpyro.subsample(x, event_dim=1)
        for level, size in enumerate(units, 1):
            h = layer(f"h{level}", linear(f"guide{level}", h, size))


class Fit:
    """A fit that can be continued for some seconds at a time."""

    def __init__(self, objective, steps_at_once):
        self.svi = SVI(model, guide, optax.adam(0.005), objective)
        self.steps_at_once, self.compiled = steps_at_once, None

    def start(self, key, x, units):
        state = self.svi.init(key, x, units, BATCH)
        if self.compiled is None:
            update = lambda state, _: (self.svi.update(state, x, units, BATCH)[0], None)  # noqa: E731
            run = lambda state: jax.lax.scan(update, state, None, length=self.steps_at_once)[0]  # noqa: E731
            self.compiled = jax.jit(run).lower(state).compile()
        return state

    def train(self, state, seconds):
        """The state after at least so many seconds, how many it were, and the number of steps."""
        start, steps = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            state = jax.block_until_ready(self.compiled(state))
            steps += self.steps_at_once
        return state, time.perf_counter() - start, steps


def compare(network, train, test, args):
    """Test bounds by objective, particles, seed and time; and the parameters of VIMCO-⋆ with 50 particles."""
    units = NETWORKS[network]
    evaluate = jax.jit(
        lambda params: -VIMCOStar(num_particles=TEST_PARTICLES).loss(random.key(1), params, model, guide, test, units)
    )
    fits = {
        (name, number): Fit(OBJECTIVES[name](num_particles=number), max(1, 2000 // number))
        for name, number in itertools.product(args.objectives, args.num_particles)
    }
    runs = list(itertools.product(fits, range(args.seed, args.seed + args.num_seeds)))
    states = {(fit, number): fits[fit].start(random.key(number), train, units) for fit, number in runs}
    seconds, steps, rows = dict.fromkeys(runs, 0.0), dict.fromkeys(runs, 0), []
    for checkpoint in args.seconds * np.array([0.25, 0.5, 1]):
        for run in runs:
            fit = fits[run[0]]
            states[run], spent, done = fit.train(states[run], checkpoint - seconds[run])
            seconds[run] += spent
            steps[run] += done
            bound = float(evaluate(fit.svi.get_params(states[run]))) / len(test)
            rows.append((network, *run[0], run[1], seconds[run], steps[run], bound))
        print(f"{network}: {checkpoint:.2f} s for each of {len(runs)} fits", flush=True)
    shown = ("VIMCO-⋆", args.num_particles[len(args.num_particles) // 2]), args.seed
    return rows, fits[shown[0]].svi.get_params(states[shown])


def means(params, x, units, key, of_guide):
    """Probabilities of the pixels, given units drawn from the guide (reconstructions) or from the model (samples)."""
    program = seed(substitute(model, params), key)
    if of_guide:
        program = replay(program, trace(seed(substitute(guide, params), key)).get_trace(x, units))
    return jax.nn.sigmoid(trace(program).get_trace(x, units)["x"]["fn"].base_dist.logits)


def plot_bounds(table, path):
    networks, numbers = table["network"].unique(), table["N"].unique()
    figure = Figure(figsize=(4 * len(numbers), 3.2 * len(networks)), layout="constrained")
    grid = figure.subplots(len(networks), len(numbers), sharex=True, sharey="row", squeeze=False)
    styles = dict(zip(OBJECTIVES, ["C0-o", "C1--^", "C3-.s", "k:x"]))
    for (row, network), (column, number) in itertools.product(enumerate(networks), enumerate(numbers)):
        axes, case = grid[row, column], table[(table["network"] == network) & (table["N"] == number)]
        for name, of_name in case.groupby("objective", sort=False):
            turns = of_name.groupby(of_name.groupby("seed").cumcount())[["seconds", "bound"]]
            mean, low, high = turns.mean(), turns.min()["bound"], turns.max()["bound"]
            axes.plot(mean["seconds"], mean["bound"], styles[name], ms=5, label=name)
            axes.fill_between(mean["seconds"], low, high, color=styles[name][:-2].rstrip("-:."), alpha=0.2)
        axes.set_title(f"{network}, N = {number}", fontsize="medium")
        axes.set(xlabel="seconds of training", ylabel="test bound (nats per digit)")
        axes.label_outer()
    grid[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=80)


def plot_digits(params, test, path):
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    for part, (network, values) in zip(figure.subfigures(len(params), 1, squeeze=False).flat, params.items()):
        units, shown = NETWORKS[network], test[:15]
        rows = {
            "test digits": shown,
            "reconstructions": means(values, shown, units, random.key(2), of_guide=True),
            "samples": means(values, shown, units, random.key(3), of_guide=False),
        }
        for axes_row, (name, images) in zip(part.subplots(3, len(shown)), rows.items()):
            for axes, image in zip(axes_row, images):
                axes.imshow(image.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
                axes.set(xticks=[], yticks=[])
            axes_row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        part.suptitle(network, fontsize="medium")
    figure.savefig(path, dpi=80)


def main(args):
    digits = jnp.asarray(load_digits().data >= 8, jnp.float32)
    train, test = train_test_split(digits, test_size=200, random_state=0)
    rows, params = [], {}
    for network in args.networks:
        of_network, params[network] = compare(network, train, test[: args.num_test], args)
        rows += of_network
    table = pd.DataFrame(rows, columns=["network", "objective", "N", "seed", "seconds", "steps", "bound"])
    last = table.groupby(["network", "N", "objective", "seed"], sort=False).last()
    shown = last.groupby(["network", "N", "objective"], sort=False)
    summary = pd.DataFrame(
        {"bound": shown["bound"].mean(), "lowest": shown["bound"].min(), "highest": shown["bound"].max()}
    )
    summary["steps"] = shown["steps"].mean().astype(int)
    print(f"\nTest bound in nats per digit after {args.seconds:g} s, over {args.num_seeds} seeds")
    print(summary.sort_index(level=["network", "N"], sort_remaining=False).to_string(float_format="%.2f"))

    args.output.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.output / "sigmoid_belief_network.csv", index=False, float_format="%.6g")
    plot_bounds(table, args.output / "sigmoid_belief_network.png")
    plot_digits(params, test, args.output / "sigmoid_belief_network_digits.png")
    print(f"\nSaved sigmoid_belief_network.csv and two pictures in {args.output}/")
    return summary


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 objectives, 5 particles, one seed, a second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("output"))
    args = parser.parse_args(argv)
    args.networks = ["2 layers"] if args.quick else list(NETWORKS)
    args.objectives = ["VIMCO-⋆", "TraceGraph_ELBO"] if args.quick else list(OBJECTIVES)
    args.num_particles = [5] if args.quick else [5, 50, 500]
    args.num_seeds, args.seconds, args.num_test = (1, 0.8, 50) if args.quick else (3, 4.0, 200)
    return args


if __name__ == "__main__":
    main(parse())
