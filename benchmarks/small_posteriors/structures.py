"""Scales, plates, regressions, change points, simplices and angles, each with a few discrete latents."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy import stats

from benchmarks.small_posteriors import problem
from benchmarks.small_posteriors.problem import Problem, line, positive, states, vector

SWITCH = states(0, 1)


def element(name, i):
    return lambda draws: draws[name][..., i]


def half_cauchy(x, unit):
    sigma = numpyro.sample("sigma", dist.HalfCauchy(unit))
    z = numpyro.sample("z", dist.Bernoulli(0.3))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(0.0, sigma * (1 + 4 * z)), obs=x)


def half_cauchy_log_joint(latents, x, unit):
    sigma, z = latents["sigma"], latents["z"]
    prior = stats.halfcauchy.logpdf(sigma, scale=unit) + stats.bernoulli.logpmf(z, 0.3)
    return prior + sum(stats.norm.logpdf(value, 0, sigma * (1 + 4 * z)) for value in x)


def half_cauchy_scale(unit):
    x = unit * np.array([0.8, -1.2, 6.0])
    return Problem(
        f"half_cauchy_{unit:g}",
        half_cauchy,
        (x, unit),
        {"sigma": positive(1e-3 * unit, 1e6 * unit, 400), "z": SWITCH},
        lambda latents: half_cauchy_log_joint(latents, x, unit),
        {"log sigma": lambda d: np.log(d["sigma"] / unit), "z": lambda d: d["z"]},
    )


def waiting_time(x):
    scale = numpyro.sample("scale", dist.LogNormal(jnp.log(1e4), 2.0))
    k = numpyro.sample("k", dist.Poisson(3.0))
    numpyro.sample("x", dist.Gamma(k + 1.0, 1 / scale), obs=x)


def waiting_time_log_joint(latents):
    scale, k = latents["scale"], latents["k"]
    prior = stats.lognorm.logpdf(scale, 2, scale=1e4) + stats.poisson.logpmf(k, 3)
    return prior + stats.gamma.logpdf(2e5, k + 1, scale=scale)


RARE = np.array([3.5, -0.2, 0.4, 2.9])


def rare_share(y):
    p = numpyro.sample("p", dist.Beta(1.0, 99.0))
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", dist.Bernoulli(p))
        numpyro.sample("y", dist.Normal(3.0 * z, 1.0), obs=y)


def rare_share_log_joint(latents):
    p, z = latents["p"], latents["z"]
    prior = stats.beta.logpdf(p, 1, 99) + stats.bernoulli.logpmf(z, p[:, None]).sum(-1)
    return prior + stats.norm.logpdf(RARE, 3 * z).sum(-1)


OUTLIER = np.array([0.3, -0.5, 3.8, 0.1])


def rare_outliers(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Bernoulli(0.01))
        numpyro.sample("x", dist.Normal(mu + 4.0 * z, 1.0), obs=x)


def rare_outliers_log_joint(latents):
    mu, z = latents["mu"], latents["z"]
    prior = stats.norm.logpdf(mu) + stats.bernoulli.logpmf(z, 0.01).sum(-1)
    return prior + stats.norm.logpdf(OUTLIER, mu[:, None] + 4 * z).sum(-1)


MEASURED = np.array([2.0, 2.6])


def hierarchy(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    z = numpyro.sample("z", dist.Bernoulli(0.5))
    with numpyro.plate("groups", len(x)):
        theta = numpyro.sample("theta", dist.Normal(mu + 3.0 * z, 1.0))
        numpyro.sample("x", dist.Normal(theta, 0.5), obs=x)


def hierarchy_log_joint(latents):
    mu, z, theta = latents["mu"], latents["z"], latents["theta"]
    prior = stats.norm.logpdf(mu, 0, 5) + stats.bernoulli.logpmf(z, 0.5)
    return prior + (stats.norm.logpdf(theta, (mu + 3 * z)[:, None]) + stats.norm.logpdf(MEASURED, theta, 0.5)).sum(-1)


# The first two predictors are nearly the same one; the third is idle.
PREDICTORS = np.array(
    [
        [1.2, 1.1, -0.3], [-0.7, -0.6, 1.0], [0.4, 0.5, 0.2], [-1.3, -1.5, -0.9],
        [0.9, 0.7, 0.8], [0.1, 0.2, -1.4], [-0.5, -0.4, 0.6], [1.6, 1.7, -0.1],
    ]
)  # fmt: skip
RESPONSE = np.array([1.6, -0.5, 0.3, -1.2, 0.5, 0.6, -0.9, 1.5])


def spike_and_slab(x, y):
    with numpyro.plate("predictors", x.shape[1]):
        included = numpyro.sample("included", dist.Bernoulli(0.3))
        beta = numpyro.sample("beta", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(x @ (included * beta), 0.5), obs=y)


def spike_and_slab_log_joint(latents):
    included, beta = latents["included"], latents["beta"]
    log_p = stats.bernoulli.logpmf(included, 0.3).sum(-1) + stats.norm.logpdf(beta).sum(-1)
    for x, y in zip(PREDICTORS, RESPONSE):
        log_p += stats.norm.logpdf(y, (included * beta) @ x, 0.5)
    return log_p


COUNTS = np.array([1, 0, 2, 1, 1, 4, 3, 5, 2, 6])


def change_point(y):
    k = numpyro.sample("k", dist.DiscreteUniform(0, 9))
    before = numpyro.sample("before", dist.Gamma(2.0, 1.0))
    after = numpyro.sample("after", dist.Gamma(2.0, 1.0))
    with numpyro.plate("times", len(y)):
        numpyro.sample("y", dist.Poisson(jnp.where(jnp.arange(10) < k, before, after)), obs=y)


def change_point_log_joint(latents):
    k, before, after = latents["k"], latents["before"], latents["after"]
    prior = np.log(0.1) + stats.gamma.logpdf(before, 2) + stats.gamma.logpdf(after, 2)
    return prior + sum(stats.poisson.logpmf(y, np.where(t < k, before, after)) for t, y in enumerate(COUNTS))


CENTRES, KINDS = np.array([-3.0, 0.0, 3.0]), np.array([-2.5, 3.4, 1.4])


def three_shares(y):
    p = numpyro.sample("p", dist.Dirichlet(jnp.ones(3)))
    with numpyro.plate("data", len(y)):
        c = numpyro.sample("c", dist.Categorical(p))
        numpyro.sample("y", dist.Normal(jnp.array(CENTRES)[c], 1.0), obs=y)


def three_shares_log_joint(latents):
    p, c = latents["p"], latents["c"]
    prior = np.log(2) + np.log(np.take_along_axis(p, c, 1)).sum(-1)  # the first is the density of the flat Dirichlet
    return prior + stats.norm.logpdf(KINDS, CENTRES[c]).sum(-1)


ANGLES = np.array([2.8, -2.9])


def direction(x):
    theta = numpyro.sample("theta", dist.VonMises(0.0, 0.5))
    z = numpyro.sample("z", dist.Bernoulli(0.5))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.VonMises(theta + 2.5 * z, 3.0), obs=x)


def direction_log_joint(latents):
    theta, z = latents["theta"], latents["z"]
    prior = stats.vonmises.logpdf(theta, 0.5) + stats.bernoulli.logpmf(z, 0.5)
    return prior + sum(stats.vonmises.logpdf(x, 3, theta + 2.5 * z) for x in ANGLES)


COVARIANCE = np.array([[1.0, 0.95], [0.95, 1.0]])


def correlated(x):
    v = numpyro.sample("v", dist.MultivariateNormal(jnp.zeros(2), COVARIANCE))
    z = numpyro.sample("z", dist.Bernoulli(0.5))
    numpyro.sample("x", dist.Normal(jnp.where(z == 1, v[0] - v[1], v[0] + v[1]), 0.3), obs=x)


def correlated_log_joint(latents):
    v, z = latents["v"], latents["z"]
    prior = stats.multivariate_normal.logpdf(v, np.zeros(2), COVARIANCE) + stats.bernoulli.logpmf(z, 0.5)
    return prior + stats.norm.logpdf(0.9, v[:, 0] + np.where(z == 1, -1, 1) * v[:, 1], 0.3)


def correlated_axis():
    """Evenly in independent coordinates."""
    u, log_step = vector(line(-8, 8, 0.1), 2)
    root = np.linalg.cholesky(COVARIANCE)
    return u @ root.T, log_step + np.log(np.diag(root)).sum()


PROBLEMS = [
    half_cauchy_scale(1e-4),
    Problem(
        "waiting_time",
        waiting_time,
        (2e5,),
        {"scale": positive(10.0, 1e10, 400), "k": states(*range(40))},
        waiting_time_log_joint,
        {"log scale": lambda d: np.log(d["scale"]), "k": lambda d: d["k"]},
    ),
    Problem(
        "rare_share",
        rare_share,
        (RARE,),
        {"p": problem.unit_interval(-25, 4, 300), "z": vector(SWITCH, 4)},
        rare_share_log_joint,
        {"p": lambda d: d["p"], **{f"z[{i}]": element("z", i) for i in range(4)}},
    ),
    Problem(
        "rare_outliers",
        rare_outliers,
        (OUTLIER,),
        {"mu": line(-6, 7, 0.05), "z": vector(SWITCH, 4)},
        rare_outliers_log_joint,
        {"mu": lambda d: d["mu"], **{f"z[{i}]": element("z", i) for i in range(4)}},
    ),
    Problem(
        "hierarchy",
        hierarchy,
        (MEASURED,),
        {"mu": line(-9, 11, 0.25), "z": SWITCH, "theta": vector(line(-3, 8, 0.2), 2)},
        hierarchy_log_joint,
        {"mu": lambda d: d["mu"], "z": lambda d: d["z"], "theta[0]": element("theta", 0)},
    ),
    Problem(
        "spike_and_slab",
        spike_and_slab,
        (PREDICTORS, RESPONSE),
        {"included": vector(SWITCH, 3), "beta": vector(line(-5, 5, 0.2), 3)},
        spike_and_slab_log_joint,
        {
            **{f"included[{i}]": element("included", i) for i in range(3)},
            **{f"effect[{i}]": lambda d, i=i: d["included"][..., i] * d["beta"][..., i] for i in range(3)},
        },
    ),
    Problem(
        "change_point",
        change_point,
        (COUNTS,),
        {"k": states(*range(10)), "before": positive(1e-5, 40, 120), "after": positive(1e-5, 40, 120)},
        change_point_log_joint,
        {"k": lambda d: d["k"], "before": lambda d: d["before"], "after": lambda d: d["after"]},
    ),
    Problem(
        "three_shares",
        three_shares,
        (KINDS,),
        {"p": problem.simplex_of_three(22, 0.4), "c": vector(states(0, 1, 2), 3)},
        three_shares_log_joint,
        {
            **{f"p[{i}]": element("p", i) for i in range(3)},
            **{f"c[{i}] is 1": lambda d, i=i: d["c"][..., i] == 1 for i in range(3)},
        },
    ),
    Problem(
        "direction",
        direction,
        (ANGLES,),
        {"theta": problem.circle(200), "z": SWITCH},
        direction_log_joint,
        {"cos": lambda d: np.cos(d["theta"]), "sin": lambda d: np.sin(d["theta"]), "z": lambda d: d["z"]},
    ),
    Problem(
        "correlated",
        correlated,
        (0.9,),
        {"v": correlated_axis(), "z": SWITCH},
        correlated_log_joint,
        {"v[0]": element("v", 0), "v[1]": element("v", 1), "z": lambda d: d["z"]},
    ),
]
