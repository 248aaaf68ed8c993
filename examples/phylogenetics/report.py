"""What a fit is worth: bounds, evidence, the posterior over topologies and its distance to another; pictures."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from Bio import Phylo
from matplotlib.figure import Figure
import numpy as np
from scipy.special import logsumexp

from numpyro_vimco import Posterior

from .subsplits import SubsplitBayesianNetwork, Support
from .trees import Topology, clade_probabilities, majority_consensus, to_tree

Probabilities = Mapping[Topology, float]  # of a distribution over topologies


def own_log_weight(posterior: Posterior, num_draws: int, rng_key) -> np.ndarray:
    """Log-weights of the guide's own draws. Those of the diagnostics are of defended draws, some of which have none."""
    draws = posterior.to_arviz(rng_key=rng_key, num_samples=num_draws, resample=False, pool=False, groups=())
    return draws["sample_stats"]["log_weight"].values[0].astype(float)


def bounds(log_weight: np.ndarray) -> dict[str, np.ndarray]:
    """Bounds in nats from log-weights of the guide's draws, each from groups of so many: the ELBO from groups of 1."""
    sizes = {"ELBO": 1, "N = 10": 10, "log evidence": 1000}
    return {name: logsumexp(log_weight.reshape(-1, n), axis=1) - np.log(n) for name, n in sizes.items()}


def kl_divergence(reference: Probabilities, trees: Support, logits) -> float:
    """KL divergence in nats from a distribution over topologies of the support to the guide's."""
    entries = np.stack([trees.entries(topology) for topology in reference])
    log_q = np.asarray(SubsplitBayesianNetwork(logits, trees).log_prob(entries), float)
    p = np.array(list(reference.values()))
    return float(np.sum(p[p > 0] * (np.log(p[p > 0]) - log_q[p > 0])))


def total_variation(one: Probabilities, other: Probabilities) -> float:
    """Total variation distance of two distributions."""
    return sum(abs(one.get(topology, 0.0) - other.get(topology, 0.0)) for topology in {**one, **other}) / 2


def frequencies(trees: Support, draws: Iterable[np.ndarray]) -> Probabilities:
    """The distribution of topologies that were drawn, most frequent first."""
    counts = Counter(trees.topology(entries) for entries in draws)
    return {topology: count / counts.total() for topology, count in counts.most_common()}


def draw_consensus(posteriors: Mapping[str, Probabilities], taxa: Sequence[str], path: Path) -> None:
    """A picture of majority-rule consensus trees, side by side, with the probabilities of their clades in percent."""
    figure = Figure(figsize=(7 * len(posteriors), 1.5 + 0.3 * len(taxa)), layout="constrained")
    for axes, (name, posterior) in zip(figure.subplots(1, len(posteriors), squeeze=False).flat, posteriors.items()):
        of_clade = clade_probabilities(posterior)
        consensus = majority_consensus(of_clade)
        percent = {clade: round(100 * of_clade[clade]) for clade in consensus if clade != max(consensus)}
        tree = to_tree(consensus, taxa, confidences=percent)
        Phylo.draw(tree, axes=axes, do_show=False, label_func=lambda node: (node.name or "").replace("_", " "))
        for text in axes.texts:
            if text.get_text().isdigit():
                text.set(va="bottom", size="small")
        axes.set(title=name, ylabel="", xlabel="")
        axes.axis("off")
    figure.savefig(path, dpi=100)
