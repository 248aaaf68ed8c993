"""Where VIMCO-⋆ does not win: enumeration and reparameterisation, where they can be had, in the same time.

    python examples/when_not.py             # about 4 minutes
    python examples/when_not.py --quick     # seconds

(a) A Gaussian mixture of three components: each assignment has three states, which `TraceEnum_ELBO` and NUTS sum out.
(b) Logistic regression: everything is continuous and reparameterised, as `Trace_ELBO` and NUTS like it.

Every method has the same wall-clock time, compilation not counted, warm-up of NUTS counted. Posterior means and
standard deviations of the continuous parameters are held against a long run of NUTS. Variational guides are
independent Normals, the same for all objectives of a model; their parameters are averaged over the second half.
"""

import argparse
from functools import partial
from pathlib import Path
import time

import jax
from jax import random
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import NUTS, SVI, Trace_ELBO, TraceEnum_ELBO, init_to_value
import optax
import pandas as pd

from numpyro_vimco import VIMCOStar

MEANS, SCALES, WEIGHTS = jnp.array([-2.0, 0.0, 3.0]), jnp.array([0.5, 1.0, 1.5]), jnp.array([0.2, 0.3, 0.5])


def mixture(x):
    with numpyro.plate("component", 3):
        mean = numpyro.sample("mean", dist.Normal(0, 5))
    with numpyro.plate("data", len(x)):
        assignment = numpyro.sample("assignment", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
        numpyro.sample("x", dist.Normal(mean[assignment], SCALES[assignment]), obs=x)


def mixture_guide(x):
    """For `TraceEnum_ELBO`, which sums the assignments out."""
    loc = numpyro.param("loc", MEANS)
    width = numpyro.param("width", jnp.full(3, 0.1), constraint=dist.constraints.positive)
    with numpyro.plate("component", 3):
        numpyro.sample("mean", dist.Normal(loc, width))


def mixture_guide_of_all(x):
    """With assignments whose logits are quadratic in x, as those of the posterior are at fixed means."""
    mixture_guide(x)
    logits = numpyro.param("logits", jnp.zeros((3, 3)))
    with numpyro.plate("data", len(x)):
        numpyro.sample(
            "assignment", dist.Categorical(logits=jnp.stack([jnp.ones_like(x), x, x**2 / 4], axis=1) @ logits)
        )


def regression(predictors, outcome):
    coefficient = numpyro.sample("coefficient", dist.Normal(0, 2).expand([predictors.shape[1]]).to_event(1))
    numpyro.sample("outcome", dist.Bernoulli(logits=predictors @ coefficient).to_event(1), obs=outcome)


def regression_guide(predictors, outcome, normal=dist.Normal):
    size = predictors.shape[1]
    loc = numpyro.param("loc", jnp.zeros(size))
    width = numpyro.param("width", jnp.full(size, 0.1), constraint=dist.constraints.positive)
    numpyro.sample("coefficient", normal(loc, width).to_event(1))


class ScoreNormal(dist.Normal):
    reparametrized_params = []  # its samples carry no gradient


def by_svi(model, guide, objective, data, args):
    """Mean and standard deviation of the fitted guide, and the number of steps."""
    svi = SVI(model, guide, optax.adam(0.01), objective)
    state = svi.init(random.key(args.seed), *data)
    update = lambda state, _: (svi.update(state, *data)[0], None)  # noqa: E731
    run = jax.jit(lambda state: jax.lax.scan(update, state, None, length=20)[0]).lower(state).compile()
    start, path = time.perf_counter(), []
    while time.perf_counter() - start < args.seconds:
        state = jax.block_until_ready(run(state))
        path.append(svi.get_params(state))
    params = jax.tree.map(lambda *values: jnp.mean(jnp.stack(values), 0), *path[len(path) // 2 :])
    return params["loc"], params["width"], 20 * len(path)


def by_nuts(model, site, data, args):
    """Draws within the time, and ``num_reference`` draws of another chain; a list of arrays, warm-up left out."""
    # Started where the guides start: chains from elsewhere stay in a mode with components exchanged.
    kernel = NUTS(model, init_strategy=init_to_value(values={"mean": MEANS, "coefficient": jnp.zeros(20)}))

    def step(state, _):
        state = kernel.sample(state, data, {})
        return state, state.z[site]

    chains, compiled = [], None
    for seed, seconds, size in [(0, 0.0, args.num_reference), (1, args.seconds, 1)]:
        key = random.key(args.seed + seed)
        state = kernel.init(key, args.num_warmup, init_params=None, model_args=data, model_kwargs={})
        if compiled is None:
            compiled = jax.jit(lambda state: jax.lax.scan(step, state, None, length=50)).lower(state).compile()
        start, draws = time.perf_counter(), []
        while time.perf_counter() - start < seconds or 50 * len(draws) < args.num_warmup + size:
            state, chunk = jax.block_until_ready(compiled(state))
            draws.append(chunk)
        chains.append(np.concatenate(draws)[args.num_warmup :])
    return chains


def plot(table, seconds, path):
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(1, 2), table.groupby(level="model")):
        rows = rows.droplevel("model").iloc[::-1]
        axes.plot(rows["error of means"], rows.index, "C0o", ms=9)
        axes.hlines(rows.index, 1e-3, rows["error of means"], color="0.8", zorder=0)
        axes.set(xscale="log", xlim=(3e-3, 10), title=title, xlabel="largest error of a mean (posterior sds)")
        axes.margins(y=0.2)
    figure.suptitle(f"{seconds:g} seconds for each method", fontsize="medium")
    figure.savefig(path, dpi=100)


def main(args):
    key_x, key_assignment, key_predictors, key_outcome = random.split(random.key(args.seed), 4)
    assignment = random.choice(key_assignment, 3, (1000,), p=WEIGHTS)
    x = MEANS[assignment] + SCALES[assignment] * random.normal(key_x, (1000,))
    predictors = random.normal(key_predictors, (500, 20))
    outcome = random.bernoulli(key_outcome, jax.nn.sigmoid(predictors @ jnp.linspace(-1, 1, 20))).astype(float)
    score_guide = partial(regression_guide, normal=ScoreNormal)
    local = VIMCOStar(num_particles=8, plate_particles={"data": 8})
    of_mixture = {
        "TraceEnum_ELBO": (mixture_guide, TraceEnum_ELBO(num_particles=8)),
        "VIMCO-⋆, 8 × 8 local": (mixture_guide_of_all, local),
        "VIMCO-⋆, N = 64": (mixture_guide_of_all, VIMCOStar(num_particles=64)),
    }
    of_regression = {
        "Trace_ELBO": (regression_guide, Trace_ELBO(num_particles=16)),
        "VIMCO-⋆, doubly reparam.": (regression_guide, VIMCOStar(num_particles=16)),
        "VIMCO-⋆, score function": (score_guide, VIMCOStar(num_particles=16)),
        "VIMCO-⋆, score, α = 1": (score_guide, VIMCOStar(alpha=1, num_particles=16)),
    }
    problems = [
        ("(a) mixture", mixture, "mean", (x,), of_mixture),
        ("(b) regression", regression, "coefficient", (predictors, outcome), of_regression),
    ]
    rows = []
    for title, model, site, data, methods in problems:
        reference, draws = by_nuts(model, site, data, args)
        shown = list(methods.items())[: args.num_methods]
        results = {name: by_svi(model, *method, data, args) for name, method in shown}
        results["NUTS"] = draws.mean(0), draws.std(0), len(draws)
        for name, (mean, sd, count) in results.items():
            error, ratio = np.abs(mean - reference.mean(0)) / reference.std(0), sd / reference.std(0)
            rows.append((title, name, count, float(error.max()), float(ratio.min()), float(ratio.max())))
    columns = ["model", "method", "steps or draws", "error of means", "sd ratio, least", "sd ratio, most"]
    table = pd.DataFrame(rows, columns=columns).set_index(["model", "method"])
    print(
        f"{args.seconds:g} s each. Largest error of a posterior mean in posterior sds; fitted sd over the posterior's"
    )
    print(table.to_string(float_format="%.2f"))
    args.output.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.output / "when_not.csv", float_format="%.6g")
    plot(table, args.seconds, args.output / "when_not.png")
    print(f"Saved when_not.csv and when_not.png in {args.output}/")
    return table


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="half a second each, short runs of NUTS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("output"))
    args = parser.parse_args(argv)
    quick, full = (0.5, 100, 500, 2), (10.0, 300, 20_000, None)
    args.seconds, args.num_warmup, args.num_reference, args.num_methods = quick if args.quick else full
    return args


if __name__ == "__main__":
    main(parse())
