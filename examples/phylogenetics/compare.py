"""VIMCO-⋆, VIMCO and reweighted wake-sleep on the same tree problem, at the same number of likelihood evaluations.

    python -m examples.phylogenetics.compare --alignment DS1.fasta --trees DS1.trprobs
"""

import argparse
import itertools
from pathlib import Path
import time

import jax
from jax import random
from matplotlib.figure import Figure
import numpy as np
import pandas as pd

from numpyro_vimco import VIMCO, ReweightedWakeSleep, VIMCOStar, gradient_snr

from .alignment import read_alignment
from .fit import make_svi, train
from .report import kl_divergence, log_probabilities, make_bounds
from .subsplits import Support
from .trees import read_trees

OBJECTIVES = {"VIMCO-⋆": VIMCOStar, "VIMCO": VIMCO, "RWS": ReweightedWakeSleep}
STYLES = {"VIMCO-⋆": "C0-o", "VIMCO": "C1--^", "RWS": "C3-.s"}
MEASURES = ["ELBO", "log evidence", "KL", "SNR"]


def snr_of(statistics, num_draws: int) -> float:
    """Length of the mean gradient over the root of its total variance; the error of the mean is taken off."""
    mean, variance = (sum(np.sum(part**2) for part in parts) for parts in zip(*((s.mean, s.std) for s in statistics)))
    return float(np.sqrt(max(mean - variance / num_draws, 0.0) / variance))


def compare(trees, alignment, reference, args) -> pd.DataFrame:
    """One row for each objective, number of particles, and point of training."""
    topologies, probabilities = reference
    bounds, rows, data = None, [], (trees, alignment)
    for number, (name, objective) in itertools.product(args.num_particles, OBJECTIVES.items()):
        num_steps = args.evaluations // number
        svi = make_svi(objective(num_particles=number), num_steps, args.learning_rate)
        bounds = bounds or make_bounds(svi, data)
        seconds, start = 0.0, time.perf_counter()
        for done, state, _ in train(svi, svi.init(random.PRNGKey(args.seed), *data), data, num_steps, turns=20):
            jax.block_until_ready(state)
            if done not in (num_steps // 4, num_steps // 2, num_steps):
                continue
            seconds += time.perf_counter() - start
            params = svi.get_params(state)
            of_bounds = {key: float(value.mean()) for key, value in bounds(params, random.key(1)).items()}
            kl = kl_divergence(probabilities, log_probabilities(trees, params["logits"], topologies))
            statistics = gradient_snr(
                svi, params, model_args=data, rng_key=random.key(2), num_draws=args.num_draws
            )
            snr = snr_of([statistics["logits"]], args.num_draws)
            rows.append((number, name, done / num_steps, done, seconds, *of_bounds.values(), kl, snr))
            print(pd.DataFrame(rows[-1:], columns=COLUMNS).to_string(index=False, header=len(rows) == 1), flush=True)
            start = time.perf_counter()
    return pd.DataFrame(rows, columns=COLUMNS)


COLUMNS = ["N", "objective", "part", "steps", "seconds", "ELBO", "N = 10", "log evidence", "KL", "SNR"]


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
            if measure in ("KL", "SNR"):
                axes.set_yscale("log")
            axes.set_title(f"{measure}, after {part:.0%}", fontsize="medium")
    for axes in grid[-1]:
        axes.set_xlabel("particles N")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(OBJECTIVES))
    figure.savefig(path, dpi=80)
