"""Which alleles of two genes are inherited together, when DNA is read in pools of ten persons?

Of the blood groups MN and Ss, which are neighbours on a chromosome, a chromosome has one of four haplotypes: MS, Ms, NS
or Ns. Their numbers among the 20 chromosomes of a pool are a latent `Multinomial`, of which reads show the two margins
alone, and with error: how many have M, and how many have S. So what is known of the association comes from how both
vary between pools (Pirinen et al., "Estimating population haplotype frequencies from pooled DNA samples using a
multinomial approach", Genetic Epidemiology 32, 2008).

Data: pools of persons drawn from the genotypes of 1,698 Irish in Mourant et al., "The distribution of the human blood
groups and other polymorphisms", Oxford (1976), as `IndianIrish` in R's package hwde. The reads are simulated.

Truth: exact, by sums over all numbers of haplotypes in a pool, and quadrature over the three frequencies.
"""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy.special import expit, gammaln, log_expit
from scipy.stats import beta, binom

# How many Irish have M and S on both chromosomes, on one, and on none: rows MM, MN, NN; columns SS, Ss, ss.
IRISH = np.array([[121, 248, 164], [53, 422, 375], [9, 65, 241]])
PLATE = "pool"
POOLS, PERSONS, ERROR = 40, 10, 0.01
CHROMOSOMES = 2 * PERSONS
HAS = np.array([[1, 1, 0, 0], [1, 0, 1, 0]])  # which of the haplotypes MS, Ms, NS and Ns have M, and which S


def data():
    rng = np.random.default_rng(7)
    persons = rng.permutation(np.repeat(np.arange(9), IRISH.ravel()))[: POOLS * PERSONS].reshape(POOLS, PERSONS)
    alleles = np.stack([(2 - persons // 3).sum(1), (2 - persons % 3).sum(1)])
    depth = rng.poisson(60, (2, POOLS))
    reads = rng.binomial(depth, ERROR + (1 - 2 * ERROR) * alleles / CHROMOSOMES)
    return jnp.asarray(reads, jnp.float32), jnp.asarray(depth)


def model(reads, depth):
    """``reads`` with the alleles M and S, and how many there are, have shape (2, pools)."""
    frequency = numpyro.sample("frequency", dist.Dirichlet(jnp.ones(4)))
    with numpyro.plate("pool", reads.shape[1], dim=-1):
        haplotypes = numpyro.sample("haplotypes", dist.Multinomial(CHROMOSOMES, frequency))
        share = ERROR + (1 - 2 * ERROR) * (haplotypes @ HAS.T).T / CHROMOSOMES
        with numpyro.plate("gene", 2, dim=-2):
            numpyro.sample("reads", dist.Binomial(depth, share), obs=reads)


def asked(draw, reads, depth):
    """Frequencies, the linkage disequilibrium, and how many chromosomes have both M and S: in each pool, and in all."""
    p, both = draw["frequency"], draw["haplotypes"][:, 0]
    return {"frequency": p, "linkage": p[0] * p[3] - p[1] * p[2], "both": both, "total": both.sum()}


def pymc_model(reads, depth):
    import pymc as pm

    reads, depth = np.asarray(reads, int), np.asarray(depth)
    with pm.Model() as built:
        frequency = pm.Dirichlet("frequency", np.ones(4))
        # One after the other, as Metropolis steps do not keep the sum of a `Multinomial`.
        rest, left, haplotypes = CHROMOSOMES, 1.0, []
        for i in range(3):
            number = pm.Binomial(f"number_{i}", rest, frequency[i] / left, shape=reads.shape[1], initval=[5] * POOLS)
            haplotypes.append(number)
            rest, left = rest - number, left - frequency[i]
        haplotypes = pm.Deterministic("haplotypes", pm.math.stack([*haplotypes, rest], 1))
        share = ERROR + (1 - 2 * ERROR) * pm.math.dot(haplotypes, HAS.T).T / CHROMOSOMES
        pm.Binomial("reads", depth, share, observed=reads)
    return built


def on_grid(axes, reads, depth):
    """Log joint of parameters and data, and moments given the parameters, for `of_grid`.

    :param axes: logits of the frequency of M, and of S on chromosomes with M and on those with N.
    """
    reads, depth = np.asarray(reads, int), np.asarray(depth)
    grid = np.meshgrid(*axes, indexing="ij", sparse=True)
    of_m, s_with_m, s_with_n = map(expit, grid)
    # The uniform distribution on frequencies of four haplotypes.
    log_joint = beta.logpdf(of_m, 2, 2) + sum(log_expit(x) + log_expit(-x) for x in grid)
    counts = np.stack(np.meshgrid(*[np.arange(CHROMOSOMES + 1)] * 3, indexing="ij")).reshape(3, -1)
    counts = counts[:, counts.sum(0) <= CHROMOSOMES]
    counts = np.concatenate([counts, CHROMOSOMES - counts.sum(0, keepdims=True)])  # (4, tables)
    share = ERROR + (1 - 2 * ERROR) * (HAS @ counts) / CHROMOSOMES
    likelihood = binom.pmf(reads[..., None], depth[..., None], share[:, None]).prod(0)  # (pools, tables)
    ways = np.exp(gammaln(CHROMOSOMES + 1.0) - gammaln(counts + 1.0).sum(0))
    powers = lambda p, i, j: p ** counts[i] * (1 - p) ** counts[j]  # noqa: E731
    with_m, with_n = powers(s_with_m.reshape(-1, 1), 0, 1), powers(s_with_n.reshape(-1, 1), 2, 3)  # (points, tables)
    weighted = np.stack([likelihood * ways * counts[0] ** power for power in range(3)])
    both = np.zeros((2, *log_joint.shape, reads.shape[1]))
    for i, p in enumerate(of_m.ravel()):
        given_m = p ** counts[:2].sum(0) * (1 - p) ** counts[2:].sum(0)
        sums = np.einsum("kpt,mt,nt->kmnp", weighted * given_m, with_m, with_n, optimize=True)
        log_joint[i] += np.log(sums[0]).sum(-1)
        mean, square = sums[1:] / sums[0]
        both[:, i] = mean, square - mean**2
    frequency = np.stack(np.broadcast_arrays(
        of_m * s_with_m, of_m * (1 - s_with_m), (1 - of_m) * s_with_n, (1 - of_m) * (1 - s_with_n)
    ), -1)  # fmt: skip
    linkage = of_m * (1 - of_m) * (s_with_m - s_with_n)
    return log_joint, {"frequency": (frequency, 0), "linkage": (linkage, 0), "both": both, "total": both.sum(-1)}


def truth(reads, depth, size=28):
    from benchmarks.posteriors.quadrature import of_grid

    # The data allow that no chromosome has both N and S: the logit has a tail to the left.
    axes = np.linspace(-0.5, 0.9, size), np.linspace(-2, 1.2, size), np.linspace(-17.5, 1, 3 * size)
    log_joint, moments = on_grid(axes, reads, depth)
    source = f"sums over haplotypes, quadrature with {size} points for two parameters and {3 * size} for the third"
    return of_grid(axes, log_joint, moments, source)
