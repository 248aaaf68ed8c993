"""How many clusters do 82 galaxies form, by their velocities? A mixture of three to six Normals.

The components are in the order of their locations: each is a gap above the one before. Those above the number have no
galaxies, and the posterior of their parameters is the prior. Data: Postman, Huchra & Geller, "Probes of large-scale
structure in the Corona Borealis region", Astronomical Journal 92 (1986), as in R's `MASS::galaxies`, in 1,000 km/s.

Truth: sequential Monte Carlo for each number, weighted by its evidence, and nested sampling of all latents at once, the
number among them, by `dynesty`. Chains of NUTS stay in different modes even of three components, and nested sampling
with 500 live points loses some of these.
"""

import jax
from jax.nn import logsumexp
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

FEWEST, MOST = 3, 6
# fmt: off
VELOCITIES = [
    9172, 9350, 9483, 9558, 9775, 10227, 10406, 16084, 16170, 18419, 18552, 18600, 18927, 19052, 19070, 19330, 19343,
    19349, 19440, 19473, 19529, 19541, 19547, 19663, 19846, 19856, 19863, 19914, 19918, 19973, 19989, 20166, 20175,
    20179, 20196, 20215, 20221, 20415, 20629, 20795, 20821, 20846, 20875, 20986, 21137, 21492, 21701, 21814, 21921,
    21960, 22185, 22209, 22242, 22249, 22314, 22374, 22495, 22746, 22747, 22888, 22914, 23206, 23241, 23263, 23484,
    23538, 23542, 23666, 23706, 23711, 24129, 24285, 24289, 24366, 24717, 24990, 25633, 26690, 26995, 32065, 32789,
    34279,
]
# fmt: on
POINTS = jnp.array([10.0, 17.0, 20.0, 23.0, 26.0, 33.0])


def parameters(most):
    """Of the mixture with this number of components, or more than are used."""
    first = numpyro.sample("first", dist.Normal(15, 7))
    with numpyro.plate("gaps", most - 1):
        gap = numpyro.sample("gap", dist.Gamma(2, 0.4))
    with numpyro.plate("component", most):
        scale = numpyro.sample("scale", dist.LogNormal(0, 0.5))
        share = numpyro.sample("share", dist.Gamma(2, 1))
    return {"first": first, "gap": gap, "scale": scale, "share": share}


def log_density(draw, number, velocity):
    """Log density of each velocity in the mixture of the first components."""
    location = jnp.concatenate([jnp.zeros(1), jnp.cumsum(draw["gap"])]) + draw["first"]
    share = jnp.where(jnp.arange(len(location)) < number, draw["share"], 0)
    terms = dist.Normal(location, draw["scale"]).log_prob(velocity[:, None])
    return logsumexp(terms, b=share / share.sum(-1, keepdims=True), axis=-1)


def model(velocity):
    number = numpyro.sample("number", dist.DiscreteUniform(FEWEST, MOST))
    p = parameters(MOST)
    location = jnp.concatenate([jnp.zeros(1), jnp.cumsum(p["gap"])]) + p["first"]
    share = jnp.where(jnp.arange(MOST) < number, p["share"], 0)
    mixture = dist.MixtureSameFamily(dist.Categorical(share / share.sum()), dist.Normal(location, p["scale"]))
    with numpyro.plate("galaxy", len(velocity)):
        numpyro.sample("velocity", mixture, obs=velocity)


def enumerated(velocity):
    # NumPyro 0.22 enumerates a DiscreteUniform from 0 on: a categorical distribution without smaller values instead.
    prior = dist.Categorical((jnp.arange(MOST + 1) >= FEWEST) / (MOST - FEWEST + 1))
    number = numpyro.sample("number", prior, infer={"enumerate": "parallel"})
    p = parameters(MOST)
    with numpyro.plate("galaxy", len(velocity)):
        numpyro.factor("velocity", log_density(p, jnp.maximum(number, 1)[..., None], velocity))


def asked(draw, velocity):
    """Which number of components, and the log density of another galaxy at six velocities."""
    number = jax.nn.one_hot(draw["number"] - FEWEST, MOST - FEWEST + 1)
    return {"number": number, "log_density": log_density(draw, draw["number"], POINTS)}


def pymc_model(velocity):
    import pymc as pm
    import pytensor.tensor as pt

    with pm.Model() as model:
        number = pm.DiscreteUniform("number", FEWEST, MOST)
        first = pm.Normal("first", 15, 7)
        gap = pm.Gamma("gap", 2, 0.4, shape=MOST - 1)
        scale = pm.LogNormal("scale", 0, 0.5, shape=MOST)
        share = pm.Gamma("share", 2, 1, shape=MOST)
        location = first + pt.concatenate([np.zeros(1), pt.cumsum(gap)])
        share = pt.where(np.arange(MOST) < number, share, 0)
        components = pm.Normal.dist(location, scale)
        pm.Mixture("velocity", w=share / share.sum(), comp_dists=components, observed=np.asarray(velocity))
    return model


def data():
    return (jnp.asarray(np.array(VELOCITIES) / 1000, jnp.float32),)


def given_number(velocity, number):
    """The model with a number of components that is known."""
    numpyro.factor("velocity", log_density(parameters(MOST), number, velocity).sum())


def truth(velocity):
    from benchmarks.posteriors import agreed
    from benchmarks.posteriors.samplers import SMC, average_evidence, nested_sampling, of_runs, precise

    with jax.enable_x64(True):
        sequential, runs = SMC(given_number, (velocity, jnp.array(1))), {}
        for number in range(FEWEST, MOST + 1):
            args = velocity, jnp.array(number)
            runs[number] = sequential(args, num_particles=2000, num_runs=6)
        one = over_numbers(runs, "sequential Monte Carlo for each number, 6 runs of 2000")
        found, log_evidences = nested_sampling(nested, 3 * MOST + 1, num_live=3000, num_runs=4)
        draws = jax.vmap(jax.vmap(lambda x: asked(latents_of(x, jnp), None)))(jnp.asarray(found))
    draws = {name: np.asarray(x, float) for name, x in draws.items()}
    other = of_runs(draws, "nested sampling by dynesty, 4 runs of 3000 live points", *average_evidence(log_evidences))
    # The average would be less precise than the first.
    return precise(one._replace(source=agreed(one, other).source))


def latents_of(x, xp):
    """From one vector to the latents, by NumPy or by JAX's."""
    first, gap, scale, share = xp.split(x[1:], [1, MOST, 2 * MOST])
    return {"number": xp.floor(x[0]).astype(int), "first": first[0], "gap": gap, "scale": scale, "share": share}


def nested():
    """The log likelihood of a vector, and how it comes from a point of the unit cube, for `dynesty`: NumPy alone."""
    from scipy.special import gammaincinv, ndtri

    velocity = np.array(VELOCITIES) / 1000

    def from_cube(u):
        first, gap, scale, share = np.split(u[1:], [1, MOST, 2 * MOST])
        number = FEWEST + (MOST - FEWEST + 1) * u[:1]
        return np.concatenate([
            number, 15 + 7 * ndtri(first), gammaincinv(2, gap) / 0.4, np.exp(0.5 * ndtri(scale)), gammaincinv(2, share)
        ])  # fmt: skip

    def log_likelihood(x):
        draw = latents_of(x, np)
        used = draw["number"]
        location = draw["first"] + np.concatenate([[0.0], np.cumsum(draw["gap"])])[:used]
        scale, share = draw["scale"][:used], draw["share"][:used]
        terms = np.exp(-0.5 * ((velocity[:, None] - location) / scale) ** 2) @ (share / share.sum() / scale)
        return np.log(terms + 1e-300).sum() - 0.5 * len(velocity) * np.log(2 * np.pi)

    return log_likelihood, from_cube


def over_numbers(found, source):
    """Truth from latents and log evidences given each number, with standard errors from the runs.

    :param found: by number, latents by name, of shape (runs, draws, *shape), and log evidences, of shape (runs,).
    """
    from benchmarks.posteriors import Truth
    from benchmarks.posteriors.samplers import average_evidence

    log_evidences = np.stack([log_evidence for _, log_evidence in found.values()]) - np.log(len(found))
    total = np.logaddexp.reduce(log_evidences)
    probability = np.exp(log_evidences - total)  # (numbers, runs)
    means, squares = {}, {}
    for (number, (latents, _)), weight in zip(found.items(), probability):
        draw = {**latents, "number": jnp.full(latents["first"].shape, number)}
        for name, x in jax.jit(jax.vmap(jax.vmap(lambda draw: asked(draw, None))))(draw).items():
            x = np.asarray(x, float)
            means[name] = means.get(name, 0) + weight[:, None] * x.mean(1)
            squares[name] = squares.get(name, 0) + weight[:, None] * (x**2).mean(1)
    average = {name: x.mean(0) for name, x in means.items()}
    sds = {name: np.sqrt(np.maximum(squares[name].mean(0) - x**2, 0)) for name, x in average.items()}
    errors = {name: x.std(0, ddof=1) / len(x) ** 0.5 for name, x in means.items()}
    return Truth(average, sds, errors, *average_evidence(total), source)
