"""Aligned DNA sequences: read from FASTA, or simulated, and compressed to site patterns."""

from pathlib import Path
from typing import NamedTuple

from Bio import SeqIO
import jax
from jax import random
import jax.numpy as jnp
import numpy as np

from . import InputError

# The nucleotides that each letter stands for (IUPAC). Gaps are missing data: they stand for all.
NUCLEOTIDES = {
    **{letter: letter for letter in "ACGT"},
    **{"U": "T", "R": "AG", "Y": "CT", "S": "CG", "W": "AT", "K": "GT", "M": "AC"},
    **{"B": "CGT", "D": "AGT", "H": "ACT", "V": "ACG"},
    **dict.fromkeys("NX?-", "ACGT"),
}


class Alignment(NamedTuple):
    """An alignment of n taxa with S distinct site patterns. The last taxon is the outgroup.

    No argument for `jax.jit`, as names are no arrays.

    :ivar taxa: names.
    :ivar tips: of shape (n, 4, S): 1 where the pattern admits the nucleotide, else 0.
    :ivar counts: number of sites with each pattern, of shape (S,).
    """

    taxa: list[str]
    tips: jax.Array
    counts: jax.Array


def read_alignment(path: Path, outgroup: str | None = None) -> Alignment:
    """Read a FASTA file.

    :param outgroup: a taxon; defaults to the first. All results are the same whichever it is, but for the support
        of the guide, in which every tree is rooted there.
    :raises InputError: for fewer than 4 taxa, a taxon twice, rows of unequal length, or letters that stand for no
        nucleotide.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            records = list(SeqIO.parse(file, "fasta"))
    except ValueError as error:
        raise InputError(f"{path}: no FASTA file; it must begin with '>' and be text in UTF-8.") from error
    sequences: dict[str, str] = {}
    for record in records:
        if record.id in sequences:
            raise InputError(f"{path}: taxon '{record.id}' is there twice; names end at the first blank, rename one.")
        sequences[record.id] = str(record.seq).upper()
    if len(sequences) < 4:
        raise InputError(f"{path}: {len(sequences)} taxa; an unrooted tree has a topology to infer from 4 taxa on.")
    first = next(iter(sequences))
    length = len(sequences[first])
    if not length:
        raise InputError(f"{path}: taxon '{first}' has no sites.")
    for taxon, letters in sequences.items():
        if len(letters) != length:
            raise InputError(
                f"{path}: taxon '{taxon}' has {len(letters)} sites, but '{first}' has {length}; align the sequences."
            )
        if unknown := sorted(set(letters) - set(NUCLEOTIDES)):
            raise InputError(
                f"{path}: taxon '{taxon}' has the letter '{unknown[0]}' at site {letters.index(unknown[0]) + 1}, which "
                f"is no nucleotide code; the codes are {''.join(NUCLEOTIDES)}."
            )
    outgroup = first if outgroup is None else outgroup
    if outgroup not in sequences:
        raise InputError(f"{path}: no taxon '{outgroup}' to be the outgroup; there are {', '.join(sequences)}.")
    sequences[outgroup] = sequences.pop(outgroup)  # last
    return compress(list(sequences), np.array([list(letters) for letters in sequences.values()]))


def compress(taxa: list[str], letters: np.ndarray) -> Alignment:
    """The distinct columns of letters of shape (n, sites), and how often each is there."""
    admits = {letter: [float(base in bases) for base in "ACGT"] for letter, bases in NUCLEOTIDES.items()}
    tips = np.moveaxis([[admits[letter] for letter in row] for row in letters], 2, 1)
    patterns, counts = np.unique(tips, axis=2, return_counts=True)
    return Alignment(taxa, jnp.asarray(patterns, float), jnp.asarray(counts, float))


def simulate(rng_key, taxa: list[str], children, branch_lengths, num_sites: int) -> Alignment:
    """Sequences that evolved along a tree under the Jukes-Cantor model; arguments as in :mod:`.likelihood`."""
    num_taxa = len(taxa)
    states: dict[int, np.ndarray] = {}

    def evolve(key, parent, length):
        # With probability 1 - exp(-4/3 length), the state is drawn anew.
        renewed, new = random.split(key)
        renewed = random.bernoulli(renewed, -np.expm1(-4 / 3 * length), (num_sites,))
        return np.where(renewed, random.randint(new, (num_sites,), 0, 4), parent)

    keys = iter(random.split(rng_key, 2 * num_taxa))
    states[num_taxa - 1] = np.asarray(random.randint(next(keys), (num_sites,), 0, 4))  # the outgroup
    states[num_taxa] = evolve(next(keys), states[num_taxa - 1], branch_lengths[-1])
    for node, (pair, lengths) in enumerate(zip(children, np.reshape(branch_lengths[:-1], (-1, 2))), num_taxa):
        for child, length in zip(pair, lengths):
            states[int(child)] = evolve(next(keys), states[node], length)
    return compress(taxa, np.array(list("ACGT"))[[states[taxon] for taxon in range(num_taxa)]])
