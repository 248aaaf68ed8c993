"""Unrooted tree topologies as sets of clades, read from files, written as Newick, enumerated.

A topology of n taxa is rooted on the edge to the last taxon, the outgroup. Every edge then has a *clade* below it: the
set of taxa on the side without the outgroup, here an integer whose bit i says that taxon i is in it. A binary topology
has the n - 1 other taxa and n - 2 larger clades, of which the set of all n - 1 taxa is the root's.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from types import MappingProxyType

from Bio import Phylo
from Bio.Nexus.Nexus import NexusError
from Bio.Nexus.Trees import TreeError
from Bio.Phylo.Newick import Clade, Tree
from Bio.Phylo.NewickIO import NewickError, Writer

from . import InputError

Topology = frozenset[int]  # the clades of two or more taxa


def read_trees(path: Path, taxa: Sequence[str]) -> dict[Topology, float]:
    """Distinct topologies in a Newick or NEXUS file, and their probabilities: in NEXUS by weights `[&W 0.28]`, if there
    are any; else by frequency.

    :param taxa: names of the taxa that all trees must have; the last is the outgroup.
    :raises InputError: for no trees, other taxa, or a tree that is not binary once unrooted.
    """
    try:
        text = path.read_text(encoding="utf-8-sig").lstrip()
        kind = "nexus" if text.upper().startswith("#NEXUS") else "newick"
        parsed = list(Phylo.parse(StringIO(text), kind))
    except (NewickError, NexusError, TreeError, ValueError) as error:
        raise InputError(f"{path}: no trees in Newick or NEXUS that Biopython can read: {error}") from error
    weights: Counter[Topology] = Counter()
    for number, tree in enumerate(parsed, 1):
        for leaf in tree.get_terminals():
            if kind == "nexus" and leaf.name[:1] == leaf.name[-1:] == "'":
                leaf.name = leaf.name[1:-1].replace("''", "'")  # Biopython leaves quotes there
        weight = 1.0 if tree.weight is None else tree.weight
        weights[topology_of(tree, taxa, f"{path}, tree {number}")] += weight
    total = sum(weights.values())
    if not total > 0:
        raise InputError(
            f"{path}: {'no' if not parsed else 'no weight on any of its'} trees; candidate trees are needed."
        )
    return {topology: weight / total for topology, weight in weights.items()}


def write_trees(posterior: Mapping[Topology, float], taxa: Sequence[str], path: Path) -> None:
    """A NEXUS file of weighted topologies."""
    lines = [
        f" tree tree_{number} = [&W {probability:.6f}] {to_newick(topology, taxa)}"
        for number, (topology, probability) in enumerate(posterior.items(), 1)
    ]
    path.write_text("\n".join(["#NEXUS", "begin trees;", *lines, "end;", ""]))


def topology_of(tree: Tree, taxa: Sequence[str], where: str) -> Topology:
    """The clades of a Biopython tree, wherever it is rooted. ``where`` is named in errors."""
    root = tree.root
    while len(root.clades) == 1:
        root = root.clades[0]
    names = [leaf.name for leaf in tree.get_terminals()]
    for taxon, count in Counter(names).items():
        if count > 1 or taxon not in taxa:
            raise InputError(f"{where}: taxon '{taxon}' is {'there twice' if count > 1 else 'not in the alignment'}.")
    if missing := [taxon for taxon in taxa if taxon not in names]:
        raise InputError(f"{where}: taxon '{missing[0]}' of the alignment is missing.")
    bit = {taxon: 1 << index for index, taxon in enumerate(taxa)}
    whole, outgroup = (1 << len(taxa)) - 1, bit[taxa[-1]]
    clades: set[int] = set()
    below: dict[int, int] = {}
    for node in tree.find_clades(order="postorder"):
        clade = bit[node.name] if node.is_terminal() else sum(below[id(child)] for child in node)
        below[id(node)] = clade
        clades.add(whole ^ clade if clade & outgroup else clade)
        if len(node.clades) > (3 if node is root else 2):
            some = min(node.get_terminals(), key=lambda leaf: leaf.name).name
            raise InputError(
                f"{where}: not binary, {len(node.clades)} branches leave the node above taxon '{some}'; resolve it."
            )
    return frozenset(clade for clade in clades if clade.bit_count() > 1)


def children_of(clades: Topology) -> dict[int, list[int]]:
    """The clades that each clade splits into, by their lowest taxon; parents before children."""
    parts = {}
    for clade in sorted(clades, key=int.bit_count, reverse=True):
        parts[clade], rest = [], clade
        for other in sorted(clades, key=int.bit_count, reverse=True):
            if other != clade and other & rest == other:
                parts[clade].append(other)
                rest ^= other
        while rest:
            parts[clade].append(lowest(rest))
            rest ^= lowest(rest)
        parts[clade].sort(key=lowest)
    return parts


def lowest(clade: int) -> int:
    """The lowest taxon of a clade, as a clade."""
    return clade & -clade


def all_topologies(num_taxa: int) -> Iterator[Topology]:
    """All (2n - 5)!! of them."""

    def grow(clades: list[int], taxon: int) -> Iterator[Topology]:
        # `clades` are those of all edges so far, single taxa too: a new taxon is put on each edge in turn.
        if taxon == num_taxa - 1:
            yield frozenset(clade for clade in clades if clade.bit_count() > 1)
            return
        new = 1 << taxon
        for edge in clades:
            above = [clade | new if clade & edge == edge and clade != edge else clade for clade in clades]
            yield from grow([*above, new, edge | new], taxon + 1)

    return grow([1, 2, 3], 2)


def to_tree(
    clades: Topology,
    taxa: Sequence[str],
    lengths: Mapping[int, float] = MappingProxyType({}),
    confidences: Mapping[int, float] = MappingProxyType({}),
) -> Tree:
    """A Biopython tree, with the outgroup's branch at its root."""
    parts = children_of(clades)

    def build(clade: int) -> Clade:
        name = None if clade in parts else taxa[clade.bit_length() - 1]
        node = Clade(name=name, clades=[build(part) for part in parts.get(clade, [])])
        node.branch_length = lengths.get(clade)
        node.confidence = confidences.get(clade)
        return node

    root = build(max(clades))
    root.clades.append(Clade(name=taxa[-1], branch_length=root.branch_length))
    root.branch_length = None
    return Tree(root=root)


def to_newick(clades: Topology, taxa: Sequence[str], lengths: Mapping[int, float] = MappingProxyType({})) -> str:
    """The same as a line of Newick."""
    (line,) = Writer([to_tree(clades, taxa, lengths)]).to_strings(plain=not lengths)
    return line


def clade_probabilities(posterior: Mapping[Topology, float]) -> dict[int, float]:
    """The probability of each clade of two or more taxa."""
    of_clade: Counter[int] = Counter()
    for topology, probability in posterior.items():
        for clade in topology:
            of_clade[clade] += probability
    return dict(of_clade)


def majority_consensus(of_clade: Mapping[int, float]) -> Topology:
    """The clades of the majority-rule consensus tree: of more than half the probability, hence compatible."""
    return frozenset(clade for clade, probability in of_clade.items() if probability > 0.5)
