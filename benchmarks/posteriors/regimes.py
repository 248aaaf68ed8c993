"""Regime switching: in which quarters was the economy of the United States in a recession?

Growth of real output in 100 quarters from 1959 to 1984, before it became steadier, in percent a year (`macrodata` of
statsmodels, from the Federal Reserve Bank of St. Louis; rounded). Two regimes that last, each with a mean; the state of
each quarter is a latent. Truth: two samplers, Gibbs over states and parameters, and NUTS with the states summed out.
J. D. Hamilton (1989), A new approach to the economic analysis of nonstationary time series and the business cycle,
Econometrica 57, 357-384.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.contrib.control_flow import scan
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS
from scipy.special import expit, logit, logsumexp
from scipy.stats import beta, halfnorm, lognorm, multivariate_t, norm, truncnorm

from benchmarks.posteriors import agreed, of_chains

MEAN_SCALE, RISE_SCALE, NOISE_MEDIAN, NOISE_SPREAD, STAY = 2.0, 4.0, 3.0, 0.5, (8.0, 2.0)
NUM_STEPS = 8000
PARAMETERS = ("recession", "rise", "noise", "stay")
# fmt: off
GROWTH = np.array([
    9.98, -0.48, 1.4, 8.88, -1.87, 0.65, -5.16, 2.37, 7.41, 6.41, 8.06, 7.11, 4.39, 3.68, 0.97, 5.19, 4.98,
    7.46, 3.03, 8.88, 4.57, 5.4, 1.11, 9.71, 5.39, 8.04, 9.54, 9.7, 1.33, 2.62, 3.23, 3.51, 0.08, 3.18, 3.04,
    8.16, 6.73, 2.73, 1.73, 6.25, 1.16, 2.52, -1.88, -0.63, 0.72, 3.55, -4.26, 10.88, 2.26, 3.18, 1.11, 7.09,
    9.38, 3.82, 6.53, 10.1, 4.6, -2.14, 3.8, -3.52, 1.02, -3.97, -1.58, -4.9, 3.05, 6.68, 5.19, 8.99, 3.0, 1.95,
    2.89, 4.62, 7.87, 7.09, -0.08, 1.36, 15.43, 3.9, 5.26, 0.67, 0.38, 2.86, 1.1, 1.29, -8.28, -0.74, 7.33,
    8.23, -3.2, 4.83, -5.01, -6.62, 2.16, -1.55, 0.32, 4.94, 8.89, 7.81, 8.18, 7.68,
])
# fmt: on


def data():
    return (jnp.asarray(GROWTH, jnp.float32),)


def parameters():
    recession = numpyro.sample("recession", dist.Normal(0, MEAN_SCALE))
    rise = numpyro.sample("rise", dist.HalfNormal(RISE_SCALE))
    noise = numpyro.sample("noise", dist.LogNormal(np.log(NOISE_MEDIAN), NOISE_SPREAD))
    with numpyro.plate("regime", 2):
        stay = numpyro.sample("stay", dist.Beta(*STAY))  # in a recession, and in an expansion
    return recession, rise, noise, stay


def states_and_growth(growth, **infer):
    recession, rise, noise, stay = parameters()
    probability = jnp.stack([1 - stay[0], stay[1], 0.5])  # after a recession, after an expansion, at the beginning

    def quarter(previous, growth):
        # A new dict each time, as NumPyro writes into it.
        expansion = numpyro.sample("expansion", dist.Bernoulli(probability[previous]), infer=dict(infer))
        numpyro.sample("growth", dist.Normal(recession + rise * expansion, noise), obs=growth)
        return expansion, None

    scan(quarter, 2, growth)


def model(growth):
    states_and_growth(growth)


def enumerated(growth):
    states_and_growth(growth, enumerate="parallel")


def asked(draw, growth):
    changes = draw["expansion"][1:] != draw["expansion"][:-1]
    return {
        "expansion": draw["expansion"],
        "num_switches": changes.sum(),
        "recession": draw["recession"],
        "rise": draw["rise"],
        "log_noise": jnp.log(draw["noise"]),
        "stay": draw["stay"],
    }


def summed_out(growth):
    """The model with the states summed out, forward in time."""
    recession, rise, noise, stay = parameters()
    log_density = dist.Normal(recession + rise * jnp.arange(2), noise).log_prob(growth[:, None])
    transition = jnp.log(jnp.stack([jnp.array([stay[0], 1 - stay[0]]), jnp.array([1 - stay[1], stay[1]])]))

    def quarter(log_forward, log_density):
        return jax.nn.logsumexp(log_forward[:, None] + transition, 0) + log_density, None

    first = jnp.log(0.5) + log_density[0]
    numpyro.factor("growth", jax.nn.logsumexp(jax.lax.scan(quarter, first, log_density[1:])[0]))


class Filter:
    """The states given parameters, for many chains at a time (float64).

    Parameters have shape (chains,), and ``stay`` (chains, 2).
    """

    def __init__(self, growth):
        self.growth = np.asarray(growth, float)

    def forward(self, recession, rise, noise, stay):
        """Probability of an expansion given the data so far, of shape (quarters, chains), and log-likelihoods."""
        filtered, log_likelihood = np.empty((len(self.growth), len(rise))), np.zeros(len(rise))
        predicted = np.full(len(rise), 0.5)
        for t, growth in enumerate(self.growth):
            z = (growth - recession) / noise, (growth - recession - rise) / noise
            low, high = (np.exp(-0.5 * x**2) / (np.sqrt(2 * np.pi) * noise) for x in z)
            both = (1 - predicted) * low + predicted * high
            filtered[t] = predicted * high / both
            log_likelihood += np.log(both)
            predicted = filtered[t] * stay[:, 1] + (1 - filtered[t]) * (1 - stay[:, 0])
        return filtered, log_likelihood

    def draw(self, rng, recession, rise, noise, stay):
        """States of shape (quarters, chains), backward in time."""
        filtered, _ = self.forward(recession, rise, noise, stay)
        states = np.empty(filtered.shape, int)
        uniform = rng.random(filtered.shape)
        states[-1] = uniform[-1] < filtered[-1]
        for t in range(len(states) - 2, -1, -1):
            to_next = np.where(states[t + 1] == 1, (1 - stay[:, 0], stay[:, 1]), (stay[:, 0], 1 - stay[:, 1]))
            odds = filtered[t] * to_next[1], (1 - filtered[t]) * to_next[0]
            states[t] = uniform[t] * (odds[0] + odds[1]) < odds[0]
        return states


def quantities(states, recession, rise, noise, stay):
    """What is asked, with states of shape (quarters, ...)."""
    return {
        "expansion": np.moveaxis(states, 0, -1),
        "num_switches": (states[1:] != states[:-1]).sum(0),
        "recession": recession,
        "rise": rise,
        "log_noise": np.log(noise),
        "stay": stay,
    }


def gibbs(filtering, num_chains, num_sweeps, rng, warm_up=500):
    """States given parameters, and each parameter given the states and the others; the noise by Metropolis steps."""
    growth = filtering.growth[:, None]
    recession, rise = rng.normal(0, MEAN_SCALE, num_chains), np.abs(rng.normal(0, RISE_SCALE, num_chains))
    noise, stay = np.full(num_chains, NOISE_MEDIAN), rng.beta(*STAY, (num_chains, 2))
    kept = []
    for sweep in range(warm_up + num_sweeps):
        states = filtering.draw(rng, recession, rise, noise, stay)
        variance = 1 / (MEAN_SCALE**-2 + len(growth) / noise**2)
        recession = variance * (growth - rise * states).sum(0) / noise**2 + variance**0.5 * rng.normal(size=num_chains)
        variance = 1 / (RISE_SCALE**-2 + states.sum(0) / noise**2)
        mean = variance * ((growth - recession) * states).sum(0) / noise**2
        scale = variance**0.5
        rise = truncnorm.rvs(-mean / scale, np.inf, mean, scale, random_state=rng)
        squares = ((growth - recession - rise * states) ** 2).sum(0)
        log_density = lambda x, squares=squares: (  # noqa: E731, of log noise
            norm.logpdf(x, np.log(NOISE_MEDIAN), NOISE_SPREAD) - len(growth) * x - 0.5 * squares * np.exp(-2 * x)
        )
        for _ in range(3):
            old, new = np.log(noise), np.log(noise) + 0.1 * rng.normal(size=num_chains)
            accepted = np.log(rng.random(num_chains)) < log_density(new) - log_density(old)
            noise = np.exp(np.where(accepted, new, old))
        before, after = states[:-1], states[1:]
        for k in (0, 1):
            stayed, left = ((before == k) & (after == k)).sum(0), ((before == k) & (after != k)).sum(0)
            stay[:, k] = rng.beta(STAY[0] + stayed, STAY[1] + left)
        if sweep >= warm_up:
            kept.append(quantities(states, recession, rise, noise, stay.copy()))
    return {name: np.stack([each[name] for each in kept], 1) for name in kept[0]}


def importance_evidence(filtering, draws, rng, num_draws=20_000):
    """Log evidence and its error, by a multivariate t in unconstrained space with the moments of posterior draws."""
    flat = [np.reshape(draws[name], (-1, *draws[name].shape[2:])) for name in PARAMETERS]
    unconstrained = np.column_stack([flat[0], np.log(flat[1]), np.log(flat[2]), logit(flat[3])])
    proposal = multivariate_t(unconstrained.mean(0), np.cov(unconstrained.T), df=5, seed=rng)
    u = proposal.rvs(num_draws)
    recession, rise, noise, stay = u[:, 0], np.exp(u[:, 1]), np.exp(u[:, 2]), expit(u[:, 3:])
    log_prior = norm.logpdf(recession, 0, MEAN_SCALE) + halfnorm.logpdf(rise, scale=RISE_SCALE) + u[:, 1]
    log_prior += lognorm.logpdf(noise, NOISE_SPREAD, scale=NOISE_MEDIAN) + u[:, 2]
    log_prior += (beta.logpdf(stay, *STAY) + np.log(stay * (1 - stay))).sum(1)
    log_weight = filtering.forward(recession, rise, noise, stay)[1] + log_prior - proposal.logpdf(u)
    log_mean = logsumexp(log_weight) - np.log(num_draws)
    return float(log_mean), float(np.exp(log_weight - log_mean).std() / num_draws**0.5)


def truth(growth, num_draws=2000, num_sweeps=4000):
    filtering, rng = Filter(growth), np.random.default_rng(0)
    with jax.enable_x64(True):
        mcmc = MCMC(
            NUTS(summed_out, target_accept_prob=0.9), num_warmup=1000, num_samples=num_draws, num_chains=4,
            chain_method="vectorized", progress_bar=False,
        )  # fmt: skip
        mcmc.run(jax.random.key(0), jnp.asarray(filtering.growth))
        found = {name: np.asarray(x) for name, x in mcmc.get_samples(group_by_chain=True).items()}
    flat = {name: found[name].reshape(-1, *found[name].shape[2:]) for name in PARAMETERS}
    states = filtering.draw(rng, **flat).reshape(-1, *found["rise"].shape)
    evidence = importance_evidence(filtering, found, rng)
    by_nuts = of_chains(
        quantities(states, **{n: found[n] for n in PARAMETERS}), "NUTS with states summed out", *evidence
    )
    by_gibbs = of_chains(gibbs(filtering, 64, num_sweeps, rng), "Gibbs sampling of 64 chains")
    return agreed(by_nuts, by_gibbs)
