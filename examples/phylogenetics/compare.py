"""VIMCO-⋆, VIMCO and reweighted wake-sleep on the same trees, at the same number of likelihood evaluations.

python -m examples.phylogenetics.compare --alignment DS1.fasta --trees DS1.trprobs
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
from numpyro.infer.svi import SVIRunResult
import pandas as pd

from numpyro_vimco import VIMCO, Posterior, ReweightedWakeSleep, VIMCOStar
from numpyro_vimco.diagnostics.gradient_noise import GradientStatistics

from . import run
from .alignment import Alignment, read_alignment
from .fit import inverse_temperature, make_svi, train
from .report import Probabilities, bounds, kl_divergence, own_log_weight
from .subsplits import Support
from .trees import read_trees

OBJECTIVES = {"VIMCO-⋆": VIMCOStar, "VIMCO": VIMCO, "RWS": ReweightedWakeSleep}
STYLES = {"VIMCO-⋆": "C0-o", "VIMCO": "C1--^", "RWS": "C3-.s"}
MEASURES = ["ELBO", "log evidence", "KL", "SNR"]
COLUMNS = ["N", "objective", "part", "seconds", "ELBO", "N = 10", "log evidence", "KL", "SNR"]


def snr(statistics: GradientStatistics, num_draws: int) -> float:
    """Length of the mean gradient over the root of its total variance. What noise adds to the length is taken off."""
    variance = np.sum(statistics.std**2)
    return float(np.sqrt(max(np.sum(statistics.mean**2) - variance / num_draws, 0.0) / variance))


def compare(trees: Support, alignment: Alignment, reference: Probabilities, args) -> pd.DataFrame:
    """One row for each number of particles, objective, and point of training."""
    rows, data = [], (trees, alignment)
    for number, (name, objective) in itertools.product(args.num_particles, OBJECTIVES.items()):
        num_steps = 4 * (args.evaluations // (4 * number))  # so that a quarter is a whole number
        svi = make_svi(objective(num_particles=number), num_steps, args.learning_rate)
        first, seconds, start = svi.init(random.PRNGKey(args.seed), *data), 0.0, time.perf_counter()
        for done, state, _ in train(svi, first, data, num_steps, turns=4):
            jax.block_until_ready(state)
            if done == 3 * num_steps // 4:
                continue
            seconds += time.perf_counter() - start
            result = SVIRunResult(svi.get_params(state), state, jnp.zeros(done))
            key, beta = random.key(args.seed + 1), inverse_temperature(done, num_steps)
            log_weight = own_log_weight(Posterior(svi, result, *data), args.num_samples, key)
            statistics = Posterior(svi, result, *data, beta).gradient_snr(key, args.num_draws)
            measures = [value.mean() for value in bounds(log_weight).values()]
            measures += [
                kl_divergence(reference, trees, result.params["logits"]),
                snr(statistics["logits"], args.num_draws),
            ]
            rows.append((number, name, done / num_steps, seconds, *measures))
            print(pd.DataFrame(rows[-1:], columns=COLUMNS).to_string(index=False, header=len(rows) == 1), flush=True)
            start = time.perf_counter()
    return pd.DataFrame(rows, columns=COLUMNS)


def plot(table: pd.DataFrame, path: Path):
    """Each measure against the number of particles, a row for each point of training."""
    parts = table["part"].unique()
    figure = Figure(figsize=(3.2 * len(MEASURES), 2.5 * len(parts)), layout="constrained")
    grid = figure.subplots(len(parts), len(MEASURES), squeeze=False)
    for line, part in zip(grid, parts):
        for axes, measure in zip(line, MEASURES):
            for name, case in table[table["part"] == part].groupby("objective", sort=False):
                axes.plot(case["N"], case[measure], STYLES[name], ms=5, label=name)
            axes.set_xscale("log")
            axes.set_xticks(case["N"], case["N"].astype(str))
            axes.minorticks_off()
            if measure == "KL":
                axes.set_yscale("log")
            axes.set_title(f"{measure}, after {part:.0%}", fontsize="medium")
    for axes in grid[-1]:
        axes.set_xlabel("particles N")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(OBJECTIVES))
    figure.savefig(path, dpi=80)


def main(args):
    """Fit all, print, and save table and figure."""
    alignment = read_alignment(args.alignment)
    reference = read_trees(args.trees, alignment.taxa)
    table = compare(Support(reference, alignment.taxa), alignment, reference, args)
    last = table[table["part"] == 1]
    print(f"\nAfter {args.evaluations:,} evaluations of the likelihood")
    print(last.drop(columns="part").to_string(index=False, float_format="%.4g"))
    args.output.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.output / "phylogenetics_compare.csv", index=False, float_format="%.6g")
    plot(table, args.output / "phylogenetics_compare.png")
    print(f"\nSaved phylogenetics_compare.csv and phylogenetics_compare.png in {args.output}/")
    return table


def parse(argv=None):
    """Command line."""
    parser = argparse.ArgumentParser(
        "python -m examples.phylogenetics.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--alignment", type=Path, required=True, help="FASTA file")
    parser.add_argument("--trees", type=Path, required=True, help="Newick or NEXUS file of candidate trees, weighted")
    parser.add_argument("--num-particles", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--evaluations", type=int, default=200_000, help="of the likelihood, for each fit")
    parser.add_argument("--learning-rate", type=float, default=0.003)
    parser.add_argument("--num-samples", type=int, default=10_000, help="for bounds and evidence")
    parser.add_argument("--num-draws", type=int, default=1000, help="of the gradient, for the SNR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("output"))
    args = parser.parse_args(argv)
    if args.evaluations < 4 * max(args.num_particles):
        parser.error("--evaluations must be four times --num-particles or more: the fits are looked at in quarters")
    if args.num_samples % 1000:
        parser.error("--num-samples must be a multiple of 1,000, the number of samples of an estimate of the evidence")
    return args


if __name__ == "__main__":
    run(main, parse())
