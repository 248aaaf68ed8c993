"""The phylogenetics example: likelihood, distributions over trees, fits against the exact posterior, and errors."""

from collections import Counter
import itertools

from Bio import Phylo
import jax
from jax import random
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm
from scipy.stats import chi2

from examples.phylogenetics import compare as compare_module
from examples.phylogenetics import fit as fit_module
from examples.phylogenetics.__main__ import main, parse, simulated
from examples.phylogenetics.alignment import NUCLEOTIDES, Alignment, read_alignment
from examples.phylogenetics.likelihood import _forward, log_likelihood
from examples.phylogenetics.subsplits import SubsplitBayesianNetwork, Support, UniformTopology
from examples.phylogenetics.trees import (
    all_topologies,
    clade_probabilities,
    majority_consensus,
    read_trees,
    to_tree,
    topology_of,
)
from numpyro_vimco import VIMCOStar

TAXA = list("ABCDEF")


def random_alignment(rng, num_taxa: int, num_patterns: int) -> Alignment:
    """Codes for one nucleotide, for several, and gaps."""
    letters = rng.choice(list(NUCLEOTIDES), (num_taxa, num_patterns))
    tips = [[[float(base in NUCLEOTIDES[letter]) for letter in row] for base in "ACGT"] for row in letters]
    counts = rng.integers(1, 5, num_patterns)
    return Alignment(TAXA[:num_taxa], jnp.asarray(tips, float), jnp.asarray(counts, float))


def sum_over_states(children, branch_lengths, alignment: Alignment) -> float:
    """The log-likelihood, summed over all states of internal nodes, with transitions as matrix exponentials."""
    num_taxa = len(alignment.taxa)
    rate = np.full((4, 4), 1 / 3) - np.eye(4) * 4 / 3  # one substitution per unit of time
    transitions = [expm(rate * length) for length in np.asarray(branch_lengths)]
    site = 0.0
    for states in itertools.product(range(4), repeat=num_taxa - 2):
        terms = 0.25 * (transitions[-1][states[0]] @ alignment.tips[-1])
        for branch, child in enumerate(np.ravel(children)):
            row = transitions[branch][states[branch // 2]]
            terms = terms * (row @ alignment.tips[child] if child < num_taxa else row[states[child - num_taxa]])
        site = site + terms
    return float(np.log(site) @ alignment.counts)


@pytest.mark.parametrize("num_taxa", [4, 5])
def test_pruning_is_the_sum_over_internal_states(num_taxa, x64):
    rng = np.random.default_rng(num_taxa)
    alignment = random_alignment(rng, num_taxa, 12)
    trees = Support.all(alignment.taxa)
    prune = jax.jit(lambda children, lengths: log_likelihood(children, lengths, alignment))
    for topology in all_topologies(num_taxa):
        children = trees.children(trees.entries(topology))
        lengths = jnp.asarray(rng.exponential(0.2, 2 * num_taxa - 3))
        expected = sum_over_states(children, lengths, alignment)
        np.testing.assert_allclose(prune(children, lengths), expected, rtol=1e-10)
    slope = jax.grad(log_likelihood, argnums=1)(children, lengths, alignment)
    by_jax = jax.grad(lambda lengths: _forward(children, lengths, alignment.tips, alignment.counts)[0])(lengths)
    np.testing.assert_allclose(slope, by_jax, rtol=1e-10)


def test_likelihood_does_not_depend_on_the_root(x64):
    rng = np.random.default_rng(0)
    alignment = random_alignment(rng, 6, 20)
    unrooted = to_tree(list(all_topologies(6))[40], TAXA)
    length_of = {}  # by the taxa on the side without A
    for node in unrooted.find_clades():
        names = frozenset(leaf.name for leaf in node.get_terminals())
        length_of[frozenset(TAXA) - names if "A" in names else names] = rng.exponential(0.2)
    values = []
    for outgroup in range(6):
        order = [*(taxon for taxon in range(6) if taxon != outgroup), outgroup]
        taxa = [TAXA[taxon] for taxon in order]
        topology = topology_of(unrooted, taxa, "tree")
        trees = Support([topology], taxa)
        entries = trees.entries(topology)
        lengths = []
        for split in np.asarray(trees.edges(entries).split):
            names = frozenset(taxa[i] for i in range(6) if trees.clades[split] >> i & 1)
            lengths.append(length_of[frozenset(TAXA) - names if "A" in names else names])
        rooted = Alignment(taxa, alignment.tips[jnp.array(order)], alignment.counts)
        values.append(log_likelihood(trees.children(entries), jnp.array(lengths), rooted))
    np.testing.assert_allclose(values, values[0], rtol=1e-12)


def test_likelihood_of_many_taxa_does_not_underflow():
    num_taxa, rng = 150, np.random.default_rng(0)
    tips = jnp.asarray(np.eye(4)[rng.integers(0, 4, (num_taxa, 10))].swapaxes(1, 2), float)
    # A caterpillar: every internal node has a leaf.
    below = [*range(num_taxa + 1, 2 * num_taxa - 2), num_taxa - 2]
    children = jnp.stack([jnp.arange(num_taxa - 2), jnp.array(below)], axis=1)
    value, slope = jax.value_and_grad(log_likelihood, argnums=1)(
        children, jnp.full(2 * num_taxa - 3, 20.0), Alignment([], tips, jnp.ones(10))
    )
    # Along branches as long as these, all tips are independent.
    np.testing.assert_allclose(value, 10 * num_taxa * np.log(0.25), rtol=1e-5)
    assert jnp.all(jnp.isfinite(slope))


@pytest.fixture(scope="module")
def network():
    trees = Support.all(TAXA)
    return SubsplitBayesianNetwork(random.normal(random.key(0), trees.options.shape), trees)


def test_network_sums_to_one_over_all_topologies(network, x64):
    topologies = list(all_topologies(6))
    assert len(set(topologies)) == network.trees.ways()[0] == 105
    entries = np.stack([network.trees.entries(topology) for topology in topologies])
    assert [network.trees.topology(one) for one in entries] == topologies
    table = SubsplitBayesianNetwork(jnp.asarray(network.logits, float), network.trees)
    np.testing.assert_allclose(jnp.sum(jnp.exp(table.log_prob(entries))), 1, rtol=1e-12)
    assert jnp.all(network.support(entries))
    assert not jnp.any(network.support(entries[:, ::-1]))


def test_network_of_few_trees_sums_to_one_over_all_that_they_combine_to():
    some = [list(all_topologies(7))[i] for i in np.random.default_rng(0).choice(945, 60, replace=False)]
    trees = Support(some, [*TAXA, "G"])
    inside = []
    for topology in all_topologies(7):
        try:
            inside.append(trees.entries(topology))
        except KeyError:
            assert topology not in some
    assert len(inside) == trees.ways()[0] > len(some)
    logits = random.normal(random.key(1), trees.options.shape)
    probabilities = jnp.exp(SubsplitBayesianNetwork(logits, trees).log_prob(np.stack(inside)))
    np.testing.assert_allclose(jnp.sum(probabilities), 1, rtol=1e-5)


@pytest.mark.parametrize("uniform", [False, True])
def test_samples_have_their_probabilities(network, uniform):
    # 20,000 draws of 105 topologies: a chi-square test that fails once in a million runs.
    distribution = UniformTopology(network.trees) if uniform else network
    draws = np.asarray(distribution.sample(random.key(2), (20_000,)))
    counts = Counter(map(tuple, draws))
    entries = np.stack([network.trees.entries(topology) for topology in all_topologies(6)])
    expected = 20_000 * np.exp(distribution.log_prob(entries))
    observed = np.array([counts[tuple(one)] for one in entries])
    assert observed.sum() == 20_000
    assert np.sum((observed - expected) ** 2 / expected) < chi2.isf(1e-6, 104)


def test_a_draw_has_the_probability_of_the_same_tree_read_from_a_file(network, tmp_path):
    draw = np.asarray(network.sample(random.key(3)))
    tree = to_tree(network.trees.topology(draw), TAXA)
    rerooted = to_tree(network.trees.topology(draw), TAXA)
    rerooted.root_with_outgroup("C")
    for file_format in "newick", "nexus":
        Phylo.write([tree, rerooted], tmp_path / file_format, file_format)
        ((topology, probability),) = read_trees(tmp_path / file_format, TAXA).items()
        assert probability == 1
        np.testing.assert_array_equal(network.trees.entries(topology), draw)


def test_weights_of_a_file_are_probabilities(tmp_path):
    path = tmp_path / "weighted.trprobs"
    path.write_text(
        "#NEXUS\nbegin trees;\n translate 1 A, 2 B, 3 C, 4 D;\n"
        " tree a = [&W 0.6] (1,2,(3,4));\n tree b = [&W 0.2] ((1,3),2,4);\nend;\n"
    )
    posterior = read_trees(path, TAXA[:4])
    np.testing.assert_allclose(list(posterior.values()), [0.75, 0.25])
    # With D as the outgroup, the clades are AB and AC, and that of all but D.
    assert clade_probabilities(posterior) == pytest.approx({0b0011: 0.75, 0b0101: 0.25, 0b0111: 1.0})
    consensus = to_tree(majority_consensus(clade_probabilities(posterior)), TAXA[:4])
    assert topology_of(consensus, TAXA[:4], "consensus") == next(iter(posterior))


@pytest.mark.parametrize("num_taxa", [5, 6])
def test_fit_finds_the_exact_posterior(num_taxa, tmp_path):
    # The weighted posterior has an error of its own: 5,000 draws, resampled from 20,000. Over seeds, the total
    # variation is 0.01 to 0.02.
    args = ["--quick", "--num-taxa", str(num_taxa), "--output", str(tmp_path)]
    diagnostics, measures, log_evidence = main(parse(args))
    assert measures["Total variation between exact and weighted draws"] < 0.05
    assert abs(diagnostics.log_evidence - log_evidence) < 0.2
    assert {path.name for path in tmp_path.iterdir()} == {"phylogenetics.nc", "phylogenetics.png"}


def test_fit_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    trees, alignment = simulated(4, 20, random.key(0))
    path = tmp_path / "fit.npz"

    def run(checkpoint, seed=0):
        objective = VIMCOStar(num_particles=3)
        return fit_module.fit(trees, alignment, objective, 20, seed=seed, checkpoint=checkpoint, progress_bar=False)

    _, whole = run(None)
    save = fit_module._save

    def save_and_stop(path, state, done, settings):
        save(path, state, done, settings)
        if done == 12:
            raise KeyboardInterrupt

    monkeypatch.setattr(fit_module, "_save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run(path)
    monkeypatch.undo()
    _, rest = run(path)
    assert len(rest.losses) == 8
    jax.tree.map(np.testing.assert_array_equal, rest.params, whole.params)
    with pytest.raises(ValueError, match="other settings or data"):
        run(path, seed=1)


def test_compare(tmp_path, monkeypatch):
    _, alignment = simulated(4, 20, random.key(0))
    letters = np.array(list("ACGT"))[np.argmax(alignment.tips, axis=1)]
    fasta = "".join(f">{name.split()[1]}\n{''.join(row)}\n" for name, row in zip(alignment.taxa, letters))
    (tmp_path / "a.fasta").write_text(fasta)
    Phylo.write([to_tree(t, TAXA[:4]) for t in all_topologies(4)], tmp_path / "a.newick", "newick")
    monkeypatch.setattr(compare_module, "OBJECTIVES", {"VIMCO-⋆": VIMCOStar})
    files = ["--alignment", str(tmp_path / "a.fasta"), "--trees", str(tmp_path / "a.newick"), "--output", str(tmp_path)]
    sizes = ["--num-particles", "5", "--evaluations", "200", "--num-samples", "1000", "--num-draws", "20"]
    table = compare_module.main(compare_module.parse([*files, *sizes]))
    assert list(table["part"]) == [0.25, 0.5, 1]
    assert np.all(table["ELBO"] <= table["N = 10"]) and np.all(table["N = 10"] <= table["log evidence"])
    assert np.all(np.isfinite(table.drop(columns="objective").astype(float)))
    assert (tmp_path / "phylogenetics_compare.png").exists()


SEQUENCES = {"A": "ACGT", "B": "ACGA", "C": "AC-N", "D": "RCGT"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"B": "ACG"}, r"a.fasta: taxon 'B' has 3 sites, but 'A' has 4"),
        ({"C": "ACGJ"}, r"a.fasta: taxon 'C' has the letter 'J' at site 4, which is no nucleotide code"),
        ({"D": None}, r"a.fasta: 3 taxa; an unrooted tree"),
        ({"D": "ACGT\n>A\nACGT"}, r"a.fasta: taxon 'A' is there twice"),
    ],
)
def test_errors_of_an_alignment(change, message, tmp_path):
    sequences = {**SEQUENCES, **change}
    path = tmp_path / "a.fasta"
    path.write_text("".join(f">{name}\n{letters}\n" for name, letters in sequences.items() if letters))
    with pytest.raises(ValueError, match=message):
        read_alignment(path)


def test_an_outgroup_that_is_not_there(tmp_path):
    path = tmp_path / "a.fasta"
    path.write_text("".join(f">{name}\n{letters}\n" for name, letters in SEQUENCES.items()))
    assert read_alignment(path, "B").taxa == ["A", "C", "D", "B"]
    with pytest.raises(ValueError, match="no taxon 'Z' to be the outgroup"):
        read_alignment(path, "Z")


@pytest.mark.parametrize(
    "tree, message",
    [
        ("((A,B),(C,D));", r"tree 2: taxon 'E' of the alignment is missing"),
        ("((A,B),(C,(D,(E,F))));", r"tree 2: taxon 'F' is not in the alignment"),
        ("((A,B),(A,(C,(D,E))));", r"tree 2: taxon 'A' is there twice"),
        ("((A,B,C),(D,E));", r"tree 2: not binary, 3 branches leave the node above taxon 'A'"),
        ("(A,B,C,(D,E));", r"tree 2: not binary, 4 branches leave the node above taxon 'A'"),
    ],
)
def test_errors_of_trees(tree, message, tmp_path):
    path = tmp_path / "a.trees"
    path.write_text(f"((A,B),C,(D,E));\n{tree}\n")
    with pytest.raises(ValueError, match=rf"a.trees, {message}"):
        read_trees(path, TAXA[:5])


def test_other_errors(tmp_path):
    (tmp_path / "none").write_text("")
    with pytest.raises(ValueError, match="none: no trees"):
        read_trees(tmp_path / "none", TAXA)
    with pytest.raises(ValueError, match="9 taxa have too many topologies"):
        Support.all(list("ABCDEFGHI"))
    trees = Support(list(all_topologies(6))[:1], TAXA)
    with pytest.raises(ValueError, match="holds 1 of 105 topologies"):
        UniformTopology(trees).sample(random.key(0))
    with pytest.raises(ValueError, match=r"logits have shape \(2, 2\)"):
        SubsplitBayesianNetwork(jnp.zeros((2, 2)), trees)
    with pytest.raises(SystemExit):
        parse(["--alignment", "a.fasta"])
