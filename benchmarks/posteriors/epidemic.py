"""How did influenza spread in 287 households, when a test misses some infections? A chain-binomial epidemic.

The first generation of a household is infected from outside. After that, who is left is infected by each of the
generation before with the same probability. Only the number of infected after the epidemic is known, and with error:
serology finds an infection with a probability whose prior mean is 0.8. The latents are the generations.

Data: influenza A (H3N2) in Tecumseh, Michigan, in the winter 1977/78, households by size and number infected: Table 2
in the supplement of Toni & Stumpf, "Simulation-based model selection for dynamical systems in systems and population
biology", Bioinformatics 26 (2010), of Addy, Longini & Haber, "A generalized stochastic model for the analysis of
infectious disease final size data", Biometrics 47 (1991). The chains are those of Longini & Koopman, "Household and
community transmission parameters from final distributions of infections in households", Biometrics 38 (1982).

Truth: exact, by sums over all chains, and quadrature over the three parameters.
"""

import jax.numpy as jnp
from jax.scipy.special import logit
import numpy as np
import numpyro
from numpyro.contrib.control_flow import scan
import numpyro.distributions as dist
from scipy.special import expit, log_expit
from scipy.stats import beta, binom

# Households of 1 to 5 persons (columns) in which so many were found to be infected, from 0 (rows).
HOUSEHOLDS = np.array([
    [66, 87, 25, 22, 4], [13, 14, 15, 9, 4], [0, 4, 4, 9, 1], [0, 0, 4, 3, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]
])  # fmt: skip
PLATE = "household"
GENERATIONS = 4  # after the first one
PRIORS = {"outside": (1, 4), "contact": (1, 4), "found": (16, 4)}


def data():
    found, size = np.nonzero(HOUSEHOLDS)
    number = HOUSEHOLDS[found, size]
    return jnp.asarray(np.repeat(size + 1, number)), jnp.asarray(np.repeat(found, number))


def model(size, seen):
    """``size``, how many live in a household, and ``seen``, how many were found infected, have shape (households,)."""
    outside, contact, found = (numpyro.sample(name, dist.Beta(*prior)) for name, prior in PRIORS.items())
    households = numpyro.plate("household", len(size))
    with households:
        first = numpyro.sample("first", dist.Binomial(size, outside))

    def generation(state, _):
        susceptible, infectious = state
        with households:
            new = numpyro.sample("new", dist.Binomial(susceptible, 1 - (1 - contact) ** infectious))
        return (susceptible - new, new), None

    (spared, _), _ = scan(generation, (size - first, first), None, length=GENERATIONS)
    with households:
        numpyro.sample("seen", dist.Binomial(size - spared, found), obs=seen)


def asked(draw, size, seen):
    """Parameters as logits, and three numbers of all households.

    These are the infected where 0, 1, 2, and at least 3 were seen; the infected from outside; and the households in
    which all infections were missed.
    """
    infected = draw["first"] + draw["new"].sum(0)
    return {
        **{f"logit_{name}": logit(draw[name]) for name in PRIORS},
        "infected": jnp.where(jnp.minimum(seen, 3) == jnp.arange(4)[:, None], infected, 0).sum(1),
        "from_outside": draw["first"].sum(),
        "missed": ((infected > 0) & (seen == 0)).sum(),
    }


def pymc_model(size, seen):
    import pymc as pm

    size, seen = np.asarray(size), np.asarray(seen)
    with pm.Model() as built:
        outside, contact, found = (pm.Beta(name, *prior) for name, prior in PRIORS.items())
        new = [pm.Binomial("first", size, outside, initval=seen)]
        susceptible = size - new[0]
        for generation in range(GENERATIONS):
            risk = 1 - (1 - contact) ** new[-1]
            new.append(pm.Binomial(f"new_{generation}", susceptible, risk, initval=0 * seen))
            susceptible = susceptible - new[-1]
        pm.Deterministic("new", pm.math.stack(new[1:]))
        pm.Binomial("seen", size - susceptible, found, observed=seen)
    return built


def further_infections(susceptible, infectious, contact):
    """Probabilities of 0, 1, … infections after a generation of so many, of shape (susceptible + 1, *contact.shape)."""
    found = np.zeros((susceptible + 1, *contact.shape))
    if infectious == 0:
        found[0] = 1
        return found
    for new in range(susceptible + 1):
        probability = binom.pmf(new, susceptible, 1 - (1 - contact) ** infectious)
        found[new:] += probability * further_infections(susceptible - new, new, contact)
    return found


def on_grid(axes, size, seen):
    """Log joint of parameters (as logits) and data, and moments given the parameters, for `of_grid`."""
    from benchmarks.posteriors.quadrature import parameter_moments

    grid = np.meshgrid(*axes, indexing="ij", sparse=True)
    outside, contact, found = map(expit, grid)
    log_joint = 0.0
    for x, prior in zip(grid, PRIORS.values()):
        log_joint = log_joint + beta.logpdf(expit(x), *prior) + log_expit(x) + log_expit(-x)
    infected, from_outside, missed = np.zeros((2, *log_joint.shape, 4)), *np.zeros((2, 2, *log_joint.shape))
    kinds, households = np.unique(np.stack([size, seen]), axis=1, return_counts=True)
    for persons, those_seen, number in zip(*kinds, households):
        terms = {}  # joint probabilities with the numbers infected from outside, and in all
        for first in range(persons + 1):
            further = further_infections(persons - first, first, contact)
            for total in range(max(first, those_seen), persons + 1):
                of_first = binom.pmf(first, persons, outside) * further[total - first]
                terms[first, total] = of_first * binom.pmf(those_seen, total, found)
        probability = sum(terms.values())
        log_joint = log_joint + number * np.log(probability)
        infected[..., min(those_seen, 3)] += number * mean_and_variance(terms, lambda _, total: total)
        from_outside += number * mean_and_variance(terms, lambda first, _: first)
        if those_seen == 0:
            missed += number * mean_and_variance(terms, lambda _, total: total > 0)
    moments = dict(zip((f"logit_{name}" for name in PRIORS), parameter_moments(axes)))
    return log_joint, {**moments, "infected": infected, "from_outside": from_outside, "missed": missed}


def mean_and_variance(terms, function):
    """Of a function of states.

    :param terms: by state, its probability up to a constant, of shape (*grid).
    """
    total = sum(terms.values())
    mean, square = (sum(p * function(*state) ** power for state, p in terms.items()) / total for power in (1, 2))
    return np.stack([mean, square - mean**2])


def truth(size, seen, points=48):
    from benchmarks.posteriors.quadrature import of_grid

    axes = np.linspace(-2.7, 0, points), np.linspace(-4.5, 2, points), np.linspace(-1.2, 6.5, points)
    log_joint, moments = on_grid(axes, size, seen)
    return of_grid(axes, log_joint, moments, f"sums over chains, quadrature with {points} points for each parameter")
