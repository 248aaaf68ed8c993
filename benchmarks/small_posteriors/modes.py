"""Several modes, heavy tails, and priors that contradict the data."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import init_to_value
from numpyro.infer.autoguide import AutoNormal
from scipy import stats

from benchmarks.small_posteriors.problem import Problem, heavy_line, line, states, vector


def two_humps(x):
    humps = dist.Normal(jnp.array([-5.0, 6.0]), 0.5)
    mu = numpyro.sample("mu", dist.MixtureSameFamily(dist.Categorical(jnp.array([0.5, 0.5])), humps))
    numpyro.sample("x", dist.Normal(mu, 20.0), obs=x)


def two_humps_log_joint(latents):
    mu = latents["mu"]
    prior = np.log(0.5 * stats.norm.pdf(mu, -5, 0.5) + 0.5 * stats.norm.pdf(mu, 6, 0.5))
    return prior + stats.norm.logpdf(0.3, mu, 20)


def two_normals():
    humps = dist.Normal(jnp.array([0.0, 7.0]), 1.0)
    numpyro.sample("mu", dist.MixtureSameFamily(dist.Categorical(jnp.array([0.7, 0.3])), humps))


def two_normals_log_joint(latents):
    return np.log(0.7 * stats.norm.pdf(latents["mu"]) + 0.3 * stats.norm.pdf(latents["mu"], 7))


def student(x, df):
    mu = numpyro.sample("mu", dist.StudentT(df, 0.0, 1.0))
    z = numpyro.sample("z", dist.Bernoulli(0.4))
    numpyro.sample("x", dist.StudentT(df, mu + z, 1.0), obs=x)


def student_log_joint(latents, x, df):
    mu, z = latents["mu"], latents["z"]
    return stats.t.logpdf(mu, df) + stats.bernoulli.logpmf(z, 0.4) + stats.t.logpdf(x, df, mu + z)


def heavy_tails(x, df):
    return Problem(
        f"heavy_tails_{df:g}_x_{x:g}",
        student,
        (x, df),
        {"mu": heavy_line(), "z": states(0, 1)},
        lambda latents: student_log_joint(latents, x, df),
        {
            "near the prior": lambda d: np.abs(d["mu"]) < 1,
            "upper half": lambda d: d["mu"] > x / 2,
            "near the datum": lambda d: np.abs(d["mu"] - x) < 1,
            "z": lambda d: d["z"],
        },
    )


def data_apart(x):
    mu = numpyro.sample("mu", dist.Cauchy(0.0, 5.0))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Cauchy(mu, 1.0), obs=x)


def data_apart_log_joint(latents):
    mu = latents["mu"]
    return stats.cauchy.logpdf(mu, 0, 5) + stats.cauchy.logpdf(-8, mu) + stats.cauchy.logpdf(8, mu)


def outlying_data(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    z = numpyro.sample("z", dist.Bernoulli(0.4))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.StudentT(2.0, mu + z, 1.0), obs=x)


def outlying_data_log_joint(latents):
    mu, z = latents["mu"], latents["z"]
    prior = stats.norm.logpdf(mu) + stats.bernoulli.logpmf(z, 0.4)
    return prior + stats.t.logpdf(14, 2, mu + z) + stats.t.logpdf(16, 2, mu + z)


def three_modes(x):
    c = numpyro.sample("c", dist.Categorical(jnp.array([0.5, 0.3, 0.2])))
    mu = numpyro.sample("mu", dist.Normal(jnp.array([-6.0, 0.0, 6.0])[c], 0.5))
    numpyro.sample("x", dist.Normal(mu, 5.0), obs=x)


def three_modes_log_joint(latents):
    c, mu = latents["c"], latents["mu"]
    prior = np.log([0.5, 0.3, 0.2])[c] + stats.norm.logpdf(mu, np.array([-6, 0, 6])[c], 0.5)
    return prior + stats.norm.logpdf(1, mu, 5)


def square(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 3.0))
    z = numpyro.sample("z", dist.Bernoulli(0.5))
    numpyro.sample("x", dist.Normal(mu**2 + z, 1.0), obs=x)


def square_log_joint(latents):
    mu, z = latents["mu"], latents["z"]
    prior = stats.norm.logpdf(mu, 0, 3) + stats.bernoulli.logpmf(z, 0.5)
    return prior + stats.norm.logpdf(9, mu**2 + z, 1)


def sum_of_two(x, y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    a = numpyro.sample("a", dist.DiscreteUniform(0, 3))
    b = numpyro.sample("b", dist.DiscreteUniform(0, 3))
    numpyro.sample("x", dist.Normal(a + b, 0.2), obs=x)
    numpyro.sample("y", dist.Normal(mu + a, 1.0), obs=y)


def sum_of_two_log_joint(latents):
    mu, a, b = latents["mu"], latents["a"], latents["b"]
    prior = stats.norm.logpdf(mu) + 2 * np.log(0.25)
    return prior + stats.norm.logpdf(3, a + b, 0.2) + stats.norm.logpdf(1.5, mu + a)


def odd_number(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("switches", 3):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
    numpyro.sample("x", dist.Normal(mu + 4.0 * (z.sum() % 2), 0.5), obs=x)


def odd_number_log_joint(latents):
    mu, z = latents["mu"], latents["z"]
    prior = stats.norm.logpdf(mu) + stats.bernoulli.logpmf(z, 0.3).sum(-1)
    return prior + stats.norm.logpdf(4.2, mu + 4 * (z.sum(-1) % 2), 0.5)


def two_groups(x):
    with numpyro.plate("groups", 2):
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    with numpyro.plate("data", len(x)):
        label = numpyro.sample("label", dist.Bernoulli(0.5))
        numpyro.sample("x", dist.Normal(mu[label], 1.0), obs=x)


GROUPED = np.array([-2.1, -1.9, 1.8, 2.3])


def two_groups_log_joint(latents):
    mu, label = latents["mu"], latents["label"]
    prior = stats.norm.logpdf(mu, 0, 5).sum(-1) + len(GROUPED) * np.log(0.5)
    return prior + stats.norm.logpdf(GROUPED, np.take_along_axis(mu, label, 1), 1).sum(-1)


PROBLEMS = [
    Problem(
        "two_humps",
        two_humps,
        (0.3,),
        {"mu": line(-11, 12, 0.05)},
        two_humps_log_joint,
        {"mu": lambda d: d["mu"], "upper": lambda d: d["mu"] > 0},
    ),
    Problem(
        "two_normals_from_0",
        two_normals,
        (),
        {"mu": line(-10, 17, 0.05)},
        two_normals_log_joint,
        {"mu": lambda d: d["mu"], "upper": lambda d: d["mu"] > 3.5},
        guide=lambda model: AutoNormal(model, init_loc_fn=init_to_value(values={"mu": 0.0})),
        tempering=0.0,
    ),
    heavy_tails(1.0, 1.0),
    heavy_tails(12.0, 1.0),
    heavy_tails(8.0, 2.0),
    Problem(
        "data_apart",
        data_apart,
        (np.array([-8.0, 8.0]),),
        {"mu": heavy_line()},
        data_apart_log_joint,
        {"upper": lambda d: d["mu"] > 0, "between": lambda d: np.abs(d["mu"]) < 6},
    ),
    Problem(
        "outlying_data",
        outlying_data,
        (np.array([14.0, 16.0]),),
        {"mu": line(-9, 25, 0.02), "z": states(0, 1)},
        outlying_data_log_joint,
        {"mu": lambda d: d["mu"], "z": lambda d: d["z"]},
    ),
    Problem(
        "three_modes",
        three_modes,
        (1.0,),
        {"c": states(0, 1, 2), "mu": line(-12, 12, 0.05)},
        three_modes_log_joint,
        {"mu": lambda d: d["mu"], "first": lambda d: d["c"] == 0, "last": lambda d: d["c"] == 2},
    ),
    Problem(
        "square",
        square,
        (9.0,),
        {"mu": line(-7, 7, 0.01), "z": states(0, 1)},
        square_log_joint,
        {"mu": lambda d: d["mu"], "absolute": lambda d: np.abs(d["mu"]), "z": lambda d: d["z"]},
    ),
    Problem(
        "sum_of_two",
        sum_of_two,
        (3.0, 1.5),
        {"mu": line(-9, 9, 0.1), "a": states(0, 1, 2, 3), "b": states(0, 1, 2, 3)},
        sum_of_two_log_joint,
        {"mu": lambda d: d["mu"], **{f"a is {i}": lambda d, i=i: d["a"] == i for i in range(4)}, "b": lambda d: d["b"]},
    ),
    Problem(
        "odd_number",
        odd_number,
        (4.2,),
        {"mu": line(-9, 9, 0.05), "z": vector(states(0, 1), 3)},
        odd_number_log_joint,
        {"mu": lambda d: d["mu"], **{f"z[{i}]": lambda d, i=i: d["z"][..., i] for i in range(3)}},
    ),
    Problem(
        "two_groups",
        two_groups,
        (GROUPED,),
        {"mu": vector(line(-35, 35, 0.35), 2), "label": vector(states(0, 1), 4)},
        two_groups_log_joint,
        {
            "first mean": lambda d: d["mu"][..., 0],
            "larger mean": lambda d: d["mu"].max(-1),
            "inner two together": lambda d: d["label"][..., 1] == d["label"][..., 2],
            "last label": lambda d: d["label"][..., 3],
        },
    ),
]
