"""How volatile was the Dow Jones around the crash of 1987, and on which days did it jump? Daily returns in percent.

The logarithm of the variance is an autoregression; a jump, which is rare, adds to the variance of one day. Each day has
a continuous and a discrete latent, in a `scan`. Data: the Dow Jones Industrial Average at 151 closes from 1 June 1987
(`DJIA8012` of R's package AER; without the holidays, which repeat the close before); differences of logarithms.

Truth: NUTS with the jumps summed out, with volatilities as they are, and with independent innovations in their place.
The log evidence is importance sampling of the five parameters, with unbiased likelihoods of a particle filter.
"""

import jax
from jax import random
import jax.numpy as jnp
from jax.scipy.special import logit
import numpy as np
import numpyro
from numpyro.contrib.control_flow import scan
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS
from scipy.special import expit, log_expit, logsumexp
from scipy.special import logit as logit_of
from scipy.stats import beta, lognorm, multivariate_t, norm

PARAMETERS = ("level", "memory", "noise", "rare", "size")
# fmt: off
RETURNS = np.array([
    -0.44, 1.85, 0.7, -0.47, 1.09, 0.05, 0.04, 0.28, 0.74, 0.58, 0.66, 0.0, 0.03, 0.53, 1.01, -0.24, -0.47, 0.93,
    -0.58, 0.41, -1.17, -0.36, 1.11, -0.29, 0.83, 0.58, -0.52, 0.19, -0.12, 1.15, 0.1, 0.53, 0.52, -0.89, -0.8,
    0.09, 0.07, 0.54, 0.35, 1.03, 0.78, 1.09, 0.18, -0.58, -0.41, 0.78, 1.07, -0.09, 1.68, 1.68, -0.42, 0.83, -0.23,
    0.56, -1.71, 0.42, 1.53, 0.1, -0.46, 0.94, -0.76, -1.0, -1.34, 0.89, -1.97, -0.34, -0.1, -1.48, -0.64, 0.16,
    1.05, 1.26, 0.16, -1.79, -1.43, -0.09, -0.13, -1.27, 2.97, 0.68, -0.75, 0.15, 1.21, -0.42, 0.22, 1.64, 0.07,
    -0.03, -3.53, 0.1, -1.36, -1.38, -0.43, 1.47, -3.88, -2.42, -4.71, -25.63, 5.72, 9.67, -3.89, 0.02, -8.38, 2.89,
    0.02, 4.84, 2.81, 1.03, -2.54, -0.93, 2.04, -1.34, -3.05, -1.17, 1.11, 3.16, -1.29, 0.73, -1.39, 0.88, -2.28,
    0.96, 0.49, 2.08, -0.85, -1.89, -4.11, 0.48, 0.36, -4.0, -0.55, 2.54, 3.05, 1.81, -2.51, 0.62, 3.46, 0.44, 1.68,
    -2.57, 2.61, 0.76, -0.6, 1.36, -0.3, -2.88, -0.83, 1.2, -0.58, 3.87,
])
# fmt: on
CRASH = 97  # 19 October
DAYS = np.array([0, 40, 80, CRASH - 1, CRASH, CRASH + 1, CRASH + 5, 120, 149])
SUSPECTED = np.array(
    [78, 88, 94, CRASH - 1, CRASH, CRASH + 1, CRASH + 2, CRASH + 5, 126]
)  # some of the largest returns


def data():
    return (jnp.asarray(RETURNS, jnp.float32),)


def parameters():
    return {
        "level": numpyro.sample("level", dist.Normal(0, 1)),
        "memory": numpyro.sample("memory", dist.Beta(20, 1.5)),
        "noise": numpyro.sample("noise", dist.LogNormal(-1, 0.5)),
        "rare": numpyro.sample("rare", dist.Beta(1, 20)),
        "size": numpyro.sample("size", dist.LogNormal(1.5, 0.5)),
    }


def days(returns, **infer):
    p = parameters()

    def day(before, returned):
        h = numpyro.sample("h", dist.Normal(p["level"] + p["memory"] * (before - p["level"]), p["noise"]))
        jump = numpyro.sample("jump", dist.Bernoulli(p["rare"]), infer=dict(infer))
        numpyro.sample("returned", dist.Normal(0, jnp.sqrt(jnp.exp(h) + jump * p["size"] ** 2)), obs=returned)
        return h, None

    scan(day, p["level"], returns)


def model(returns):
    days(returns)


def enumerated(returns):
    days(returns, enumerate="parallel")


def log_terms(draw, returns):
    """Log joint of each day's return and no jump, and a jump: (2, days)."""
    log_density = lambda variance: dist.Normal(0, jnp.sqrt(variance)).log_prob(returns)  # noqa: E731
    calm, variance = jnp.log1p(-draw["rare"]), jnp.exp(draw["h"])
    return jnp.stack([calm + log_density(variance), jnp.log(draw["rare"]) + log_density(variance + draw["size"] ** 2)])


def given_others(key, draw, returns):
    return {"jump": random.categorical(key, log_terms(draw, returns), axis=0)}


def asked(draw, returns):
    """Parameters without bounds, log-variance of some days, jumps on days with large returns, and their number."""
    return {
        "level": draw["level"],
        "logit_memory": logit(draw["memory"]),
        "log_noise": jnp.log(draw["noise"]),
        "logit_rare": logit(draw["rare"]),
        "log_size": jnp.log(draw["size"]),
        "h": draw["h"][DAYS],
        "jump": draw["jump"][SUSPECTED],
        "jumps": draw["jump"].sum(),
    }


def pymc_model(returns):
    import pymc as pm

    returns = np.asarray(returns)
    with pm.Model() as built:
        level, memory = pm.Normal("level", 0, 1), pm.Beta("memory", 20, 1.5)
        noise, size = pm.LogNormal("noise", -1, 0.5), pm.LogNormal("size", 1.5, 0.5)
        first, steps = pm.Normal.dist(level, noise), len(returns) - 1
        h = pm.AR("h", [level * (1 - memory), memory], noise, constant=True, init_dist=first, steps=steps)
        jump = pm.Bernoulli("jump", pm.Beta("rare", 1, 20), shape=len(returns))
        pm.Normal("returned", 0, pm.math.sqrt(pm.math.exp(h) + jump * size**2), observed=returns)
    return built


def log_likelihood(draw, returns):
    return jax.nn.logsumexp(log_terms(draw, returns), axis=0).sum()


def centred(returns):
    """The jumps summed out."""
    p = parameters()
    h = numpyro.sample("h", dist.Normal(0, 1).expand(returns.shape).mask(False))  # flat: its density is the factor's
    before = jnp.concatenate([p["level"][None], h[:-1]])
    log_prior = dist.Normal(p["level"] + p["memory"] * (before - p["level"]), p["noise"]).log_prob(h).sum()
    numpyro.factor("joint", log_prior + log_likelihood({**p, "h": h}, returns))


def non_centred(returns):
    """The jumps summed out, and volatilities a function of independent innovations."""
    p = parameters()
    innovations = numpyro.sample("innovations", dist.Normal(0, 1).expand(returns.shape))

    def day(deviation, innovation):
        deviation = p["memory"] * deviation + p["noise"] * innovation
        return deviation, p["level"] + deviation

    h = numpyro.deterministic("h", jax.lax.scan(day, jnp.zeros_like(p["level"]), innovations)[1])
    numpyro.factor("likelihood", log_likelihood({**p, "h": h}, returns))


def by_nuts(of, returns, num_draws, num_chains=8):
    """Draws of the latents, by name, of shape (chains, draws, *shape)."""
    mcmc = MCMC(
        NUTS(of, target_accept_prob=0.9), num_warmup=1500, num_samples=num_draws, num_chains=num_chains,
        chain_method="vectorized", progress_bar=False,
    )  # fmt: skip
    mcmc.run(random.key(0), returns)
    return {name: x for name, x in mcmc.get_samples(group_by_chain=True).items() if name != "innovations"}


def log_density_of_return(returned, h, rare, size):
    """With the jump summed out."""
    calm, jumpy = np.exp(h), np.exp(h) + size**2
    of_calm = (1 - rare) * np.exp(-(returned**2) / (2 * calm)) / np.sqrt(calm)
    return np.log(of_calm + rare * np.exp(-(returned**2) / (2 * jumpy)) / np.sqrt(jumpy)) - np.log(2 * np.pi) / 2


def particle_filter(rng, returns, level, memory, noise, rare, size, num_particles=1000):
    """Logarithms of unbiased estimates of the likelihood; parameters have shape (points, 1)."""
    h, log_likelihood = np.repeat(level, num_particles, 1), np.zeros(len(level))
    for returned in returns:
        h = level + memory * (h - level) + noise * rng.normal(size=h.shape)
        log_weights = log_density_of_return(returned, h, rare, size)
        log_sum = logsumexp(log_weights, axis=1)
        log_likelihood += log_sum - np.log(num_particles)
        cumulative = np.exp(log_weights - log_sum[:, None]).cumsum(1)
        at = (rng.random(len(h))[:, None] + np.arange(num_particles)) / num_particles
        h = np.stack([x[np.minimum(np.searchsorted(c, u), num_particles - 1)] for x, c, u in zip(h, cumulative, at)])
    return log_likelihood


def importance_evidence(returns, draws, num_draws=10_000, chunk=100):
    """Log evidence and its error; parameters by a multivariate t in unconstrained space with the moments of draws."""
    flat = {name: np.ravel(draws[name]) for name in PARAMETERS}
    level, memory, noise, rare, size = flat.values()
    unconstrained = np.column_stack([level, logit_of(memory), np.log(noise), logit_of(rare), np.log(size)])
    rng = np.random.default_rng(0)
    proposal = multivariate_t(unconstrained.mean(0), np.cov(unconstrained.T), df=5, seed=rng)
    u = proposal.rvs(num_draws)
    level, memory, noise, rare, size = u[:, 0], expit(u[:, 1]), np.exp(u[:, 2]), expit(u[:, 3]), np.exp(u[:, 4])
    log_prior = norm.logpdf(level) + lognorm.logpdf(noise, 0.5, scale=np.exp(-1)) + u[:, 2]
    log_prior += lognorm.logpdf(size, 0.5, scale=np.exp(1.5)) + u[:, 4]
    for x, p, (a, b) in ((u[:, 1], memory, (20, 1.5)), (u[:, 3], rare, (1, 20))):
        log_prior += beta.logpdf(p, a, b) + log_expit(x) + log_expit(-x)
    points = np.stack([level, memory, noise, rare, size])[:, :, None]
    parts = [particle_filter(rng, returns, *points[:, i : i + chunk]) for i in range(0, num_draws, chunk)]
    log_weights = log_prior + np.concatenate(parts) - proposal.logpdf(u)
    log_mean = logsumexp(log_weights) - np.log(num_draws)
    return float(log_mean), float(np.exp(log_weights - log_mean).std() / num_draws**0.5)


def truth(returns, num_draws=6000):
    from benchmarks.posteriors import agreed, of_chains
    from benchmarks.posteriors.samplers import precise

    def of(draws, source, *evidence):
        def one(pair):
            key, draw = pair
            return asked({**draw, **given_others(key, draw, returns)}, returns)

        shape = draws["level"].shape
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), draws)
        keys = random.split(random.key(1), len(flat["level"]))
        found = jax.lax.map(one, (keys, flat), batch_size=500)
        return of_chains({name: x.reshape(*shape, *x.shape[1:]) for name, x in found.items()}, source, *evidence)

    with jax.enable_x64(True):
        returns = jnp.asarray(returns, float)
        draws, others = (by_nuts(model, returns, num_draws) for model in (non_centred, centred))
        evidence = importance_evidence(np.asarray(returns), draws)
        one = of(draws, f"NUTS of innovations, 8 chains of {num_draws}", *evidence)
        other = of(others, f"NUTS of volatilities, 8 chains of {num_draws}")
    # The average would be less precise than the first.
    return precise(one._replace(source=f"{agreed(one, other).source}; evidence by particle filters"), 0.02)
