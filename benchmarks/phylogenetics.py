"""The phylogenetics example: milliseconds of a likelihood, of its gradients, and of a whole step, for 10 trees at once.

python benchmarks/phylogenetics.py                                              # 27 simulated taxa, 1,949 sites
python benchmarks/phylogenetics.py --alignment DS1.fasta --trees DS1.trprobs

All compiled, in turns, the medians of 50 rounds. Branch lengths are drawn from the prior.
"""

import argparse
from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import interleaved, print_machine
import jax
from jax import random
import numpy as np

from examples.phylogenetics.alignment import read_alignment, simulate
from examples.phylogenetics.fit import make_svi
from examples.phylogenetics.likelihood import _forward, log_likelihood
from examples.phylogenetics.subsplits import SubsplitBayesianNetwork, Support
from examples.phylogenetics.trees import read_trees
from numpyro_vimco import VIMCOStar

TREES = 10


def random_topology(rng, num_taxa):
    """Joins two clades at random until one is left."""
    clades = [1 << taxon for taxon in range(num_taxa - 1)]
    joined = []
    while len(clades) > 1:
        i, j = sorted(rng.choice(len(clades), 2, replace=False))
        clades.append(clades.pop(j) | clades.pop(i))
        joined.append(clades[-1])
    return frozenset(joined)


def simulated():
    """As many taxa and sites as DS1 has, and 200 candidate trees."""
    rng = np.random.default_rng(0)
    taxa = [f"taxon {number}" for number in range(27)]
    trees = Support([random_topology(rng, 27) for _ in range(200)], taxa)
    network = SubsplitBayesianNetwork(np.zeros(trees.options.shape), trees)
    children = np.asarray(trees.children(network.sample(random.key(0))))
    return trees, simulate(random.key(1), taxa, children, rng.exponential(0.02, 51), 1949)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alignment", type=Path)
    parser.add_argument("--trees", type=Path)
    args = parser.parse_args()
    print_machine()
    if args.alignment:
        alignment = read_alignment(args.alignment)
        trees = Support(read_trees(args.trees, alignment.taxa), alignment.taxa)
    else:
        trees, alignment = simulated()
    tips, counts = alignment.tips, alignment.counts
    print(f"{len(alignment.taxa)} taxa, {len(counts)} patterns, {TREES} trees at once, milliseconds\n")

    network = SubsplitBayesianNetwork(np.zeros(trees.options.shape), trees)
    children = jax.vmap(trees.children)(network.sample(random.key(2), (TREES,)))
    lengths = 0.1 * random.exponential(random.key(3), (TREES, 2 * len(alignment.taxa) - 3))
    svi = make_svi(VIMCOStar(num_particles=TREES), 1000, 0.003)
    state = svi.init(random.PRNGKey(0), trees, alignment)

    def value(lengths, children):
        return log_likelihood(children, lengths, alignment)

    def plain(lengths, children):
        return _forward(children, lengths, tips, counts)[0]

    functions = {
        "likelihood": (jax.vmap(value), (lengths, children)),
        "with gradient": (jax.vmap(jax.value_and_grad(value)), (lengths, children)),
        "with gradient, by autodiff": (jax.vmap(jax.value_and_grad(plain)), (lengths, children)),
        "step of VIMCOStar": (lambda state: svi.update(state, trees, alignment), (state,)),
    }
    compiled = {name: (jax.jit(function).lower(*args).compile(), args) for name, (function, args) in functions.items()}
    for name, seconds in interleaved(compiled, 50).items():
        print(f"{name:28} {1000 * np.median(seconds):6.1f}")


if __name__ == "__main__":
    main()
