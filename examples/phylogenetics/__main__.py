"""The posterior over the trees of an alignment, by VIMCO-⋆.

    python -m examples.phylogenetics                                                # 8 simulated taxa
    python -m examples.phylogenetics --quick                                        # 6 simulated taxa, seconds
    python -m examples.phylogenetics --alignment DS1.fasta --trees DS1.trprobs      # real data

The alignment is a FASTA file. The trees, in Newick or NEXUS, are candidates, such as bootstrap trees or a sample from
MrBayes: the guide combines their subsplits. It is compared with their weights or frequencies, which the fit does not
use. With up to 8 taxa no trees are needed: the guide has all subsplits, and is compared with the exact posterior.
Without files, sequences are simulated.
"""

import argparse
from pathlib import Path
import time

from jax import random
import numpy as np

from numpyro_vimco import Posterior, VIMCOStar

from . import run
from .alignment import Alignment, read_alignment, simulate
from .exact import exact_posterior
from .fit import fit
from .model import PRIOR_MEAN_BRANCH
from .report import (
    Probabilities,
    bounds,
    draw_consensus,
    frequencies,
    kl_divergence,
    own_log_weight,
    total_variation,
)
from .subsplits import Support, UniformTopology
from .trees import read_trees, write_trees


def simulated(num_taxa: int, num_sites: int, rng_key) -> tuple[Support, Alignment]:
    """All topologies of some taxa, and sequences along one of them, drawn from the prior."""
    trees = Support.all([f"taxon {letter}" for letter in "ABCDEFGH"[:num_taxa]])
    topology_key, lengths_key, sequences_key = random.split(rng_key, 3)
    children = trees.children(UniformTopology(trees).sample(topology_key))
    lengths = PRIOR_MEAN_BRANCH * random.exponential(lengths_key, (2 * num_taxa - 3,))
    return trees, simulate(sequences_key, trees.taxa, np.asarray(children), np.asarray(lengths), num_sites)


def load(args) -> tuple[Support, Alignment, Probabilities, str]:
    """The support, the sequences, and a posterior to compare with, with its name."""
    if args.alignment:
        alignment = read_alignment(args.alignment, args.outgroup)
    if args.trees:
        reference = read_trees(args.trees, alignment.taxa)
        return Support(reference, alignment.taxa), alignment, reference, args.trees.name
    if args.alignment:
        trees = Support.all(alignment.taxa)
    else:
        trees, alignment = simulated(args.num_taxa, args.num_sites, random.key(args.seed))
    reference, log_evidence = exact_posterior(trees, alignment, random.key(args.seed + 1))
    print(f"Exact log evidence: {log_evidence:.2f} nats")
    return trees, alignment, reference, "exact"


def main(args):
    """Fit, and say how good the fit is."""
    trees, alignment, reference, origin = load(args)
    print(f"{len(alignment.taxa)} taxa, {alignment.counts.sum():.0f} sites, {len(alignment.counts)} patterns")
    print(
        f"Support: {trees.ways()[0]:,} topologies, by {np.sum(trees.options > 0)} entries in {len(trees.options)} rows"
    )

    objective, start = VIMCOStar(args.alpha, args.num_particles), time.perf_counter()
    svi, result = fit(
        trees, alignment, objective, args.num_steps, args.learning_rate, args.pairs, args.seed, args.checkpoint
    )
    seconds = time.perf_counter() - start
    if steps := len(result.losses):
        print(f"\n{steps} steps in {seconds / 60:.1f} minutes, {1000 * seconds / steps:.1f} ms each with compilation")

    posterior, key = Posterior(svi, result, trees, alignment), random.key(args.seed + 2)
    posterior.diagnose(args.num_draws, key)
    print(f"\n{posterior}\n")
    for name, values in bounds(own_log_weight(posterior, args.num_draws, key)).items():
        print(f"{name:12} {values.mean():10.2f} nats, standard deviation {values.std():.2f}")
    number = args.num_draws
    tree = posterior.to_arviz(rng_key=key, num_proposals=number, num_samples=number // 4, groups=())
    weighted = frequencies(trees, tree["posterior"]["topology"].values[0])
    measures = {
        f"KL from {origin} to guide": kl_divergence(reference, trees, result.params["logits"]),
        f"Total variation between {origin} and weighted draws": total_variation(reference, weighted),
    }
    for name, value in measures.items():
        print(f"{name}: {value:.3f}")

    args.output.mkdir(parents=True, exist_ok=True)
    tree.to_netcdf(args.output / "phylogenetics.nc")
    write_trees(weighted, trees.taxa, args.output / "phylogenetics.trees")
    draw_consensus({"VIMCO-⋆": weighted, origin: reference}, trees.taxa, args.output / "phylogenetics.png")
    print(f"\nSaved phylogenetics.nc, .trees (topologies, weighted) and .png in {args.output}/")
    return posterior, measures


def parse(argv=None):
    """Command line."""
    parser = argparse.ArgumentParser(
        "python -m examples.phylogenetics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--alignment", type=Path, help="FASTA file")
    parser.add_argument("--trees", type=Path, help="Newick or NEXUS file of candidate trees")
    parser.add_argument("--outgroup", help="the taxon to root candidate trees at; defaults to the first")
    parser.add_argument("--num-taxa", type=int, choices=range(4, 9), help="to simulate; defaults to 8, or 6 if quick")
    parser.add_argument("--num-sites", type=int, help="to simulate; defaults to 300, or 100 if quick")
    parser.add_argument("--alpha", type=float, default=0.0, help="order of the bound")
    parser.add_argument("--num-particles", type=int, default=10)
    parser.add_argument("--num-steps", type=int, help="defaults to 100,000 with trees, else 20,000, or 5,000 if quick")
    parser.add_argument("--learning-rate", type=float, default=0.003)
    parser.add_argument("--no-pairs", dest="pairs", action="store_false", help="branch lengths by split only")
    parser.add_argument("--checkpoint", type=Path, help=".npz file to save the fit in, and to go on from if it exists")
    parser.add_argument("--quick", action="store_true", help="6 simulated taxa, few steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("output"))
    args = parser.parse_args(argv)
    if args.alignment and (args.num_taxa or args.num_sites):
        parser.error("--num-taxa and --num-sites are for simulated sequences, not for those of --alignment")
    if not args.alignment and (args.trees or args.outgroup):
        parser.error("--trees and --outgroup need an --alignment")
    defaults = {"num_taxa": (8, 6), "num_sites": (300, 100), "num_steps": (100_000 if args.trees else 20_000, 5_000)}
    for name, (whole, quick) in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else whole)
        elif getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    args.num_draws = 20_000
    return args


if __name__ == "__main__":
    run(main, parse())
