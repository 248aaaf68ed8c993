"""How are eight mammals related? Trees of a part of the gene BRCA1, under the model of Jukes and Cantor.

An unrooted tree of eight species is made by stepwise addition: each species after the third is placed on one of the
3, 5, … 11 branches that are there, so that all 10,395 trees are as probable. Branch lengths are exponential, as was
long the default of MrBayes. Whether bat, cow, dog or mole are nearer to each other is not known from so few sites.

Data: sites of the first 1,000 columns of an alignment of 55 mammals without a gap in these eight (`brca1.fasta` of the
package `cogent3`, which is BSD-3; the tree beside it is named after Murphy et al., "Molecular phylogenetics and the
origins of placental mammals", Nature 409, 2001). As the model takes all nucleotides for the same, a site is written as
its pattern: ``a`` for the first nucleotide, ``b`` for the next other one, and so on; a number says how often.

Truth: importance sampling of the branch lengths of each tree, and chains that interchange neighbours. (NumPyro's
`DiscreteHMCGibbs` places one species at a time, and its chains stay with different trees: see the results.)
"""

import itertools

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from scipy.special import logsumexp, softmax
from scipy.stats import multivariate_t

SPECIES = ("human", "mouse", "dog", "cow", "bat", "mole", "armadillo", "elephant")
TAXA, BRANCHES, NUM_TREES = 8, 13, 10_395
INNER = TAXA - 2  # nodes
PRIOR_MEAN = 0.1  # of a branch length, in substitutions for each site
# fmt: off
PATTERNS = """
    aaaaaaaa414 abaaaaaa81 aabaaaaa30 aaaaabaa29 aaaaaaba28 aaaaaaab27 aaabaaaa24 aaaabaaa22 abbbbbbb15 ababaaaa10
    abaaabaa7 abbaaaaa6 aabbbbbb5 abaaaaba5 abcaaaaa5 abcccccc5 aaaaaabb4 aaababaa4 aabaaaac4 aabaacaa4 abaabaaa4
    abacaaaa4 aaaabbaa3 aaabacaa3 aabbbaaa3 aabbbbaa3 aabbbbba3 abaaacaa3 abababaa3 aaaaabba2 aaaaabbb2 aaabaaab2
    aaabaaba2 aaabaaca2 aabaaaab2 aabaabaa2 aababbab2 aabbaaaa2 aabbbabb2 abaaaaab2 abbbabbb2 abbbbabb2 abbbcbbb2
    aaaaaabc aaaaabab aaaaabac aaaaabca aaaabaab aaaababb aaaabaca aaaabcaa aaaabcba aaabaaac aaabaabc aaabbaaa
    aaabbbbb aaabcaaa aaabccaa aabaaaba aabaaabb aabaaaca aabaaacc aababbbb aabaccaa aabbabaa aabbbbbc aabbbbcb
    aabcacaa aabcbdaa aabccaaa aabccada aabcccaa abaaaaac abaaaabb abaaaaca abaaabca abaaacad abaabbaa abaacaaa
    abaacaac abaacada ababaaac ababaaba ababacaa ababbabb ababbbbb abacacaa abacbaaa abacbcaa abbaaaba abbaaabb
    abbaabab abbabbbb abbbaaaa abbbaabb abbbbbaa abbbbbab abbbbbba abbbbbcb abbbbcbb abbbcbdd abbcbbbb abcccaaa
"""
# fmt: on
# Of the seven species beside the human, groups of two to six: each is one side of a split, as a number of eight bits.
GROUPS = [group for size in range(2, TAXA - 1) for group in itertools.combinations(range(1, TAXA), size)]
SPLITS = np.array([sum(1 << species for species in group) for group in GROUPS])
SELDOM = 1e-3  # splits less probable, or more than 1 less this, are not compared


def data():
    """Nucleotides, of shape (species, patterns), and how many sites have each pattern."""
    patterns = [(text[:TAXA], int(text[TAXA:] or 1)) for text in PATTERNS.split()]
    columns = np.array([["abcd".index(letter) for letter in pattern] for pattern, _ in patterns])
    return jnp.asarray(columns.T), jnp.array([float(count) for _, count in patterns])


def grown(places, xp=jnp):
    """The tree of stepwise addition.

    Nodes are the species, from 0, and then inner nodes, from 8, in the order in which they were made. A branch is named
    by the node below it, as seen from the human, so that there is one above each node but 0.

    :param places: for each species from the fourth on, the number of the branch on which it is placed: those above
        species come first.
    :param xp: `jax.numpy` or `pytensor.tensor`.
    :return: inner nodes, each after those above it, and the two nodes below each.
    """
    slots = np.arange(INNER)
    order, below = np.where(slots == 0, TAXA, -1), np.where(slots[:, None] == 0, [1, 2], -1)
    for species, place in enumerate(places, 3):
        new = TAXA + species - 2
        branch = xp.where(place < species - 1, place + 1, place - (species - 1) + TAXA)
        below = xp.where(xp.equal(below, branch), new, below)
        below = xp.where(slots[:, None] == species - 2, xp.where(np.array([True, False]), branch, species), below)
        # Before the node on whose branch it is, or at the end where that is a species.
        slot = xp.where(branch < TAXA, species - 2, xp.argmax(xp.equal(order, branch)))
        order = xp.where(slots < slot, order, xp.where(xp.equal(slots, slot), new, xp.roll(order, 1)))
    return order, below[order - TAXA]


def log_likelihood(tree, lengths, columns, counts, xp=jnp, put=lambda x, i, y: x.at[i].set(y)):
    """By Felsenstein's pruning.

    :param tree: as `grown` returns it.
    :param lengths: of the branches above the nodes 1, 2, ….
    :param put: from an array, a position and a row to the array with that row.
    """
    order, below = tree
    # Along a branch, the nucleotide stays or is drawn anew, all four with the same probability.
    stays = xp.exp(-4 / 3 * lengths)
    mean = lambda x: (x[..., 0, :] + x[..., 1, :] + x[..., 2, :] + x[..., 3, :]) / 4  # noqa: E731
    carried = lambda x, stay: stay * x + (1 - stay) * mean(x)[..., None, :]  # noqa: E731
    tips = xp.moveaxis(xp.eye(4)[columns], -1, 1)
    above_tips = carried(tips[1:], stays[: TAXA - 1, None, None])
    # What comes up along the branch above each node: the human's own, other species', inner nodes', the last one first.
    messages = xp.concatenate([tips[:1], above_tips, 0 * tips[:INNER]])
    at = xp.concatenate([np.arange(TAXA), TAXA + INNER - 1 - xp.argsort(order)])[below[::-1]]
    stays = stays[order[::-1] - 1]
    for i in range(INNER):
        pair = messages[at[i]]
        messages = put(messages, TAXA + i, carried(pair[0] * pair[1], stays[i]))
    return xp.dot(xp.log(mean(messages[0] * messages[-1])), counts)


def model(columns, counts):
    places = []
    for species in range(3, TAXA):
        num_branches = 2 * species - 3
        uniform = dist.Categorical(jnp.full(num_branches, 1 / num_branches))
        places.append(numpyro.sample(f"place_of_{SPECIES[species]}", uniform))
    lengths = numpyro.sample("length", dist.Exponential(1 / PRIOR_MEAN).expand([BRANCHES]).to_event(1))
    numpyro.factor("alignment", log_likelihood(grown(places), lengths, columns, counts))


def places_of(draw):
    """Of the species from the fourth on."""
    return [draw[f"place_of_{name}"] for name in SPECIES[3:]]


def splits(tree):
    """Which of the `SPLITS` it has."""
    order, below = tree
    groups = jnp.concatenate([2 ** jnp.arange(TAXA), jnp.zeros(INNER, int)])
    for i in reversed(range(INNER)):
        groups = groups.at[order[i]].set(groups[below[i]].sum())
    return (groups[:, None] == SPLITS).any(0)


def asked(draw, columns, counts):
    """Which splits the tree has, and its length."""
    return {"split": splits(grown(places_of(draw))), "log_length": jnp.log(draw["length"].sum())}


def pymc_model(columns, counts):
    import pymc as pm
    import pytensor.tensor as pt

    with pm.Model() as built:
        sizes = {name: 2 * species - 3 for species, name in enumerate(SPECIES)}
        places = [pm.Categorical(f"place_of_{name}", np.full(sizes[name], 1 / sizes[name])) for name in SPECIES[3:]]
        lengths = pm.Exponential("length", 1 / PRIOR_MEAN, shape=BRANCHES)
        put = lambda x, i, y: pt.set_subtensor(x[i], y)  # noqa: E731
        log_density = log_likelihood(grown(places, pt), lengths, np.asarray(columns), np.asarray(counts), pt, put)
        pm.Potential("alignment", log_density)
    return built


def log_joint(tree, roots, *data):
    """Log density of a tree and the square roots of its branch lengths, which are nearly normal."""
    log_prior = (jnp.log(2 * roots) - roots**2 / PRIOR_MEAN - jnp.log(PRIOR_MEAN)).sum() - jnp.log(NUM_TREES)
    return log_prior + log_likelihood(tree, roots**2, *data)


def mode(tree, *data):
    """Square roots of branch lengths where the density of a tree is highest, and its logarithm's negative Hessian."""
    density = lambda roots: log_joint(tree, roots, *data)  # noqa: E731
    # Ascent in the logarithms first, then Newton's steps.
    ascent = jax.grad(lambda x: density(jnp.exp(x)))
    optimizer = optax.adam(optax.cosine_decay_schedule(-0.1, 100))

    def step(carry, _):
        x, state = carry
        updates, state = optimizer.update(ascent(x), state)
        return (optax.apply_updates(x, updates), state), None

    def newton(_, roots):
        change = jnp.linalg.solve(jax.hessian(density)(roots), jax.grad(density)(roots))
        return jnp.maximum(roots - change, roots / 3)

    start = jnp.full(BRANCHES, jnp.log(0.2))
    (x, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=100)
    roots = jax.lax.fori_loop(0, 8, newton, jnp.exp(x))
    return roots, -jax.hessian(density)(roots)


def of_all_trees(data, num_draws=20_000, num_runs=8, negligible=1e-7):
    """The truth by importance sampling of each tree's branch lengths; call it in double precision.

    Trees whose probability is negligible by Laplace's approximation are left out.
    """
    from benchmarks.posteriors import Truth
    from benchmarks.posteriors.samplers import average_evidence

    trees = np.array(list(itertools.product(*(range(2 * species - 3) for species in range(3, TAXA)))))
    assert len(trees) == NUM_TREES

    def laplace(places):
        tree = grown(places)
        roots, precision = mode(tree, *data)
        log_volume = (BRANCHES * jnp.log(2 * jnp.pi) - jnp.linalg.slogdet(precision)[1]) / 2
        return roots, precision, log_joint(tree, roots, *data) + log_volume

    found = jax.jit(lambda trees: jax.lax.map(laplace, trees, batch_size=1155))(trees)
    roots, precisions, log_weights = map(np.asarray, found)
    assert np.linalg.eigvalsh(precisions).min() > 0, "no mode was found for a tree"
    kept = np.flatnonzero(log_weights > log_weights.max() + np.log(negligible))
    density = jax.jit(lambda places, x: jax.lax.map(lambda x: log_joint(grown(places), x, *data), x, batch_size=1000))
    rng = np.random.default_rng(0)
    log_weights, means, squares = np.zeros((3, num_runs, len(kept)))
    for run, (i, tree) in itertools.product(range(num_runs), enumerate(kept)):
        proposal = multivariate_t(roots[tree], np.linalg.inv(precisions[tree]), 10)
        draws = proposal.rvs(num_draws, rng)
        of_draws = np.asarray(density(trees[tree], np.abs(draws))) - proposal.logpdf(draws)
        of_draws = np.where((draws > 0).all(1), of_draws, -np.inf)
        log_weights[run, i] = logsumexp(of_draws) - np.log(num_draws)
        log_length = np.log((draws**2).sum(1))
        means[run, i], squares[run, i] = softmax(of_draws) @ np.stack([log_length, log_length**2], 1)
    log_evidences = logsumexp(log_weights, 1)
    probabilities = np.exp(log_weights - log_evidences[:, None])
    split = probabilities @ np.stack([splits(grown(places)) for places in trees[kept]])
    mean, square = (probabilities * means).sum(1), (probabilities * squares).sum(1)
    error = lambda x: x.std(0, ddof=1) / num_runs**0.5  # noqa: E731
    p = split.mean(0)
    return Truth(
        {"split": p, "log_length": mean.mean()},
        {"split": np.sqrt(p * (1 - p)), "log_length": np.sqrt(square.mean() - mean.mean() ** 2)},
        {"split": error(split), "log_length": error(mean)},
        *average_evidence(log_evidences),
        f"importance sampling, {num_runs} runs of {num_draws} draws for each of {len(kept)} trees; "
        "the others are negligible by Laplace's approximation",
    )


def of_interchanges(data, num_chains=64, num_sweeps=4000, num_warmup=1000):
    """The truth by Metropolis steps: nearest-neighbour interchanges, and each branch length; in double precision."""
    from benchmarks.posteriors import of_chains

    def interchange(key, tree):
        """The node s beside an inner node v changes places with one of the two below v, all with their branches."""
        order, below = tree
        key, key_side = random.split(key)
        v = random.randint(key, (), 1, INNER)
        u, beside = jnp.divmod(jnp.argmax(jnp.ravel(below == order[v])), 2)
        side = random.randint(key_side, (), 0, 2)
        s, child = below[u, 1 - beside], below[v, side]
        below = below.at[u, 1 - beside].set(child).at[v, side].set(s)
        # Nodes of more species first.
        is_below = (below[..., None] == order).any(1)
        is_below = jnp.linalg.matrix_power((is_below | jnp.eye(INNER, dtype=bool)).astype(int), INNER) > 0
        position = jnp.argsort(-is_below.sum(1), stable=True)
        return order[position], below[position]

    def accepted(key, state, new):
        log_density = log_joint(*new, *data)
        accept = jnp.log(random.uniform(key)) < log_density - state[1]
        return jax.tree.map(lambda x, y: jnp.where(accept, x, y), (new, log_density), state)

    def sweep(state, key):
        def change(state, key):
            (tree, roots), _ = state
            return accepted(key, state, (interchange(random.fold_in(key, 1), tree), roots)), None

        def move(state, branch_and_key):
            branch, key = branch_and_key
            key_step, key_accept = random.split(key)
            (tree, roots), _ = state
            new = roots.at[branch].set(jnp.abs(roots[branch] + 0.05 * random.normal(key_step)))
            return accepted(key_accept, state, (tree, new)), None

        key_changes, key_moves = random.split(key)
        state, _ = jax.lax.scan(change, state, random.split(key_changes, 2 * (INNER - 1)))
        state, _ = jax.lax.scan(move, state, (jnp.arange(BRANCHES), random.split(key_moves, BRANCHES)))
        (tree, roots), _ = state
        return state, {"split": splits(tree), "log_length": jnp.log((roots**2).sum())}

    def chain(key):
        key, *keys = random.split(key, TAXA - 2)
        places = [random.randint(key, (), 0, 2 * species - 3) for species, key in enumerate(keys, 3)]
        start = grown(places), jnp.full(BRANCHES, 0.2)
        return jax.lax.scan(sweep, (start, log_joint(*start, *data)), random.split(key, num_warmup + num_sweeps))[1]

    draws = jax.jit(jax.vmap(chain))(random.split(random.key(0), num_chains))
    draws = {name: x[:, num_warmup:] for name, x in draws.items()}
    return of_chains(draws, f"nearest-neighbour interchanges, {num_chains} chains of {num_sweeps} sweeps")


def truth(*data):
    from benchmarks.posteriors import agreed
    from benchmarks.posteriors.samplers import precise

    with jax.enable_x64(True):
        data = jax.tree.map(lambda x: jnp.asarray(x, float if x.dtype == jnp.float32 else int), data)
        one, other = of_all_trees(data), of_interchanges(data)
    source, p = agreed(one, other).source, one.means["split"]
    compared = (p > SELDOM) & (p < 1 - SELDOM)
    one.sds["split"], one.errors["split"] = (np.where(compared, x["split"], 0) for x in (one.sds, one.errors))
    return precise(one._replace(source=source))  # the average would be less precise
