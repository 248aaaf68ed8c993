"""The phylogenetics example: likelihood, distributions over trees, fits against the exact posterior, and errors."""

from collections import Counter
import itertools
import re

from Bio import Phylo
import jax
from jax import random
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm
from scipy.stats import chi2

from examples.phylogenetics import InputError, run
from examples.phylogenetics import compare as compare_module
from examples.phylogenetics import fit as fit_module
from examples.phylogenetics.__main__ import main, parse, simulated
from examples.phylogenetics.alignment import NUCLEOTIDES, Alignment, read_alignment, simulate
from examples.phylogenetics.likelihood import _forward, log_likelihood
from examples.phylogenetics.report import bounds, kl_divergence, total_variation
from examples.phylogenetics.subsplits import SubsplitBayesianNetwork, Support, UniformTopology
from examples.phylogenetics.trees import (
    all_topologies,
    clade_probabilities,
    majority_consensus,
    read_trees,
    to_tree,
    topology_of,
    write_trees,
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


@pytest.mark.parametrize("num_taxa", [4, pytest.param(5, marks=pytest.mark.long)])
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
    taxa = ["taxon A", "B's", *"CDEF"]
    draw = np.asarray(network.sample(random.key(3)))
    tree = to_tree(network.trees.topology(draw), taxa)
    rerooted = to_tree(network.trees.topology(draw), taxa)
    rerooted.root_with_outgroup("C")
    for file_format in "newick", "nexus":
        Phylo.write([tree, rerooted], tmp_path / file_format, file_format)
        ((topology, probability),) = read_trees(tmp_path / file_format, taxa).items()
        assert probability == 1
        np.testing.assert_array_equal(network.trees.entries(topology), draw)


def test_weights_of_a_file_are_probabilities(tmp_path):
    path = tmp_path / "weighted.trprobs"
    path.write_text(
        "\ufeff\n#NEXUS\nbegin trees;\n translate 1 A, 2 B, 3 C, 4 D;\n"
        " tree a = [&W 0.6] ((1,2,(3,4)));\n tree b = [&W 0.2] ((1,3),2,4);\nend;\n"
    )
    posterior = read_trees(path, TAXA[:4])
    np.testing.assert_allclose(list(posterior.values()), [0.75, 0.25])
    # With D as the outgroup, the clades are AB and AC, and that of all but D.
    assert clade_probabilities(posterior) == pytest.approx({0b0011: 0.75, 0b0101: 0.25, 0b0111: 1.0})
    consensus = to_tree(majority_consensus(clade_probabilities(posterior)), TAXA[:4])
    assert topology_of(consensus, TAXA[:4], "consensus") == next(iter(posterior))
    assert majority_consensus({1: 0.5, 3: 0.51}) == {3}
    write_trees(posterior, TAXA[:4], path)
    assert read_trees(path, TAXA[:4]) == pytest.approx(posterior)


def test_edges_are_numbered_by_what_is_around_them():
    # Primary subsplit pairs, read from the splits of the unrooted tree alone.
    trees, whole = Support.all(TAXA), 0b111111
    pairs = {}
    for topology in all_topologies(6):
        sides = {side for clade in [*topology, *(1 << i for i in range(5))] for side in (clade, whole ^ clade)}

        def parts(side, sides=sides):
            inside = [other for other in sides if other != side and other & side == other]
            return frozenset(a for a in inside if side ^ a in inside)

        edges = trees.edges(trees.entries(topology))
        for split, below, above in zip(*map(np.asarray, edges)):
            clade = trees.clades[split]
            seen = (clade if clade.bit_count() > 1 else 0, parts(clade)), (whole ^ clade, parts(whole ^ clade))
            for number, what in zip((("below", below), ("above", above)), seen):
                assert pairs.setdefault(number, what) == what
    assert len(set(pairs.values())) == len(pairs)  # no two numbers for one


def test_simulated_sequences_differ_as_often_as_the_model_says():
    # Tips at distance d differ at a share 3/4 (1 - exp(-4/3 d)) of 10,000 sites: bounds of 5 standard deviations.
    children, lengths = np.array([[5, 2], [0, 1]]), np.array([0.2, 0.5, 0.1, 0.3, 0.7])
    alignment = simulate(random.key(0), TAXA[:4], children, lengths, 10_000)
    differs = 1 - np.sum(alignment.tips[0] * alignment.tips[1], axis=0) @ alignment.counts / 10_000
    to_outgroup = 1 - np.sum(alignment.tips[2] * alignment.tips[3], axis=0) @ alignment.counts / 10_000
    for share, distance in ((differs, 0.4), (to_outgroup, 0.5 + 0.7)):
        expected = 0.75 * (1 - np.exp(-4 / 3 * distance))
        assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / 10_000)


def test_measures():
    np.testing.assert_allclose([value.mean() for value in bounds(np.full(2000, 3.0)).values()], 3.0)
    spread = bounds(np.log([1.0, 3.0] * 1000))
    np.testing.assert_allclose([value.mean() for value in spread.values()], [np.log(3) / 2, np.log(2), np.log(2)])
    trees = Support.all(TAXA[:4])
    one, two, three = all_topologies(4)
    assert total_variation({one: 1.0}, {two: 1.0}) == 1
    assert total_variation({one: 0.5, two: 0.5}, {one: 0.25, three: 0.75}) == 0.75
    uniform = trees.uniform_logits()
    assert kl_divergence({one: 1 / 3, two: 1 / 3, three: 1 / 3}, trees, uniform) == pytest.approx(0, abs=1e-6)
    assert kl_divergence({one: 1.0, two: 0.0}, trees, uniform) == pytest.approx(np.log(3), rel=1e-6)


def test_inverse_temperature_rises_to_one_in_the_first_half():
    found = [fit_module.inverse_temperature(step, 100) for step in (0, 25, 50, 100)]
    np.testing.assert_allclose(found, [0.001, 0.5005, 1, 1])


@pytest.mark.long
@pytest.mark.parametrize("options", [["--num-taxa", "5", "--no-pairs"], ["--num-taxa", "6"]])
def test_fit_finds_the_exact_posterior(options, tmp_path, capsys):
    # 5,000 draws, resampled from 20,000, have an error of their own: over seeds, the total variation is about 0.01.
    diagnostics, measures = main(parse(["--quick", "--output", str(tmp_path), *options]))
    log_evidence = float(re.search(r"Exact log evidence: (\S+)", capsys.readouterr().out)[1])
    assert measures["Total variation between exact and weighted draws"] < 0.05
    assert abs(diagnostics.log_evidence - log_evidence) < 0.2
    assert {path.suffix for path in tmp_path.iterdir()} == {".nc", ".png", ".trees"}


@pytest.mark.long
def test_fit_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "new" / "fit.npz"

    def run(checkpoint, num_sites=20, seed=0):
        trees, alignment = simulated(4, num_sites, random.key(0))
        objective = VIMCOStar(num_particles=3)
        return fit_module.fit(trees, alignment, objective, 20, seed=seed, checkpoint=checkpoint, progress_bar=False)

    _, whole = run(None)
    save = fit_module._save

    def save_and_stop(path, state, done, settings):
        assert " at 0x" not in settings  # the same in the next process
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
    for other in {"seed": 1}, {"num_sites": 30}:
        with pytest.raises(InputError, match=r"fit.npz: the checkpoint of a fit with other settings or data"):
            run(path, **other)
    path.write_text("junk")
    with pytest.raises(InputError, match=r"fit.npz: no checkpoint of a fit"):
        run(path)


@pytest.mark.long
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
        (dict.fromkeys("ABCD", "\n"), r"a.fasta: taxon 'A' has no sites"),
    ],
)
def test_errors_of_an_alignment(change, message, tmp_path):
    sequences = {**SEQUENCES, **change}
    path = tmp_path / "a.fasta"
    path.write_text("".join(f">{name}\n{letters}\n" for name, letters in sequences.items() if letters))
    with pytest.raises(InputError, match=message):
        read_alignment(path)


def test_alignment_as_read(tmp_path):
    path = tmp_path / "a.fasta"
    path.write_text("\ufeff>A x\nACGTA\n>B\nacgaa\n>C\nAC-\nNA\n>D\nRCUTR\n")
    alignment = read_alignment(path, "B")
    assert alignment.taxa == ["A", "C", "D", "B"]
    columns = {tuple(map(tuple, np.asarray(alignment.tips[:, :, i], int))): alignment.counts[i] for i in range(4)}
    a, c, g, t, r, n = (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 1, 0), (1, 1, 1, 1)
    assert columns == {(a, a, r, a): 2, (c, c, c, c): 1, (g, n, t, g): 1, (t, n, t, a): 1}
    with pytest.raises(InputError, match="no taxon 'Z' to be the outgroup"):
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
    with pytest.raises(InputError, match=rf"a.trees, {message}"):
        read_trees(path, TAXA[:5])


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no trees; candidate trees are needed"),
        ("((A,B),C,(D,E);", "no trees in Newick or NEXUS"),
        ("#NEXUS\nbegin trees;\n tree a = [&W 0.0] ((A,B),C,(D,E));\nend;", "no weight on any of its trees"),
        (
            "#NEXUS\nbegin trees;\n tree a = (A,B),C,(D,E));\nend;",
            "no trees in Newick or NEXUS",
        ),
    ],
)
def test_files_without_trees(text, message, tmp_path):
    path = tmp_path / "a.trees"
    path.write_text(text)
    with pytest.raises(InputError, match=f"a.trees: {message}"):
        read_trees(path, TAXA[:5])


def test_other_errors(tmp_path):
    (tmp_path / "tree").write_text("((A,B),C,(D,E));")
    with pytest.raises(InputError, match=r"tree: no FASTA file"):
        read_alignment(tmp_path / "tree")
    with pytest.raises(InputError, match="9 taxa have too many topologies"):
        Support.all(list("ABCDEFGHI"))
    trees = Support(list(all_topologies(6))[:1], TAXA)
    with pytest.raises(ValueError, match="holds 1 of 105 topologies"):
        UniformTopology(trees).sample(random.key(0))
    with pytest.raises(ValueError, match=r"logits have shape \(2, 2\)"):
        SubsplitBayesianNetwork(jnp.zeros((2, 2)), trees)


@pytest.mark.parametrize("options", ["--trees a", "--num-taxa 9", "--num-steps 0", "--alignment a --num-sites 5"])
def test_options_that_do_not_fit(options):
    with pytest.raises(SystemExit, match="2"):
        parse(options.split())


def test_a_user_sees_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: .*none.fasta"):
        run(main, parse(["--alignment", str(tmp_path / "none.fasta")]))
