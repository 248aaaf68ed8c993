"""Bayesian variable selection with a spike and a slab, where the truth is known.

    python examples/variable_selection.py

Ten predictors of diabetes progression (442 patients, scikit-learn's copy, standardised). Each has an inclusion
indicator, which is discrete, and a coefficient. With Gaussian noise and slab, the evidence of each of the 1,024
models has a closed form: exact inclusion probabilities and evidence. Against these VIMCO-⋆ is held from four starts,
as one would use it, and NumPyro's TraceGraph_ELBO from one, with the same automatic guide, particles, steps and
tempering. `--objectives VIMCO "plain pathwise"` has others; the last is VIMCOStar with doubly_reparameterized=False.
"""

import argparse
import itertools
from pathlib import Path
import time

import arviz as az
from jax import random
import jax.numpy as jnp
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, TraceGraph_ELBO
import optax
from sklearn.datasets import load_diabetes

from numpyro_vimco import VIMCO, AutoMixed, VIMCOStar, fit, plots

INCLUSION, SLAB_VARIANCE, NOISE_VARIANCE = 0.3, 0.1, 0.5


def model(predictors, response):
    with numpyro.plate("predictor", predictors.shape[1]):
        included = numpyro.sample("included", dist.Bernoulli(INCLUSION))
        coefficient = numpyro.sample("coefficient", dist.Normal(0, SLAB_VARIANCE**0.5))
    mean = predictors @ (included * coefficient)
    with numpyro.plate("patient", len(response)):
        numpyro.sample("response", dist.Normal(mean, NOISE_VARIANCE**0.5), obs=response)


# Indicators, each given those before it, then coefficients given all indicators and the coefficients before them.
guide = AutoMixed(model)


def exact_posterior(predictors, response):
    """Log evidence and inclusion probabilities, by summing over all models in closed form (float64)."""
    predictors, response = np.asarray(predictors, float), np.asarray(response, float)
    models = np.array(list(itertools.product([0, 1], repeat=predictors.shape[1])), float)
    log_joint = np.empty(len(models))
    for i, included in enumerate(models):
        # response ~ Normal(0, noise + slab X Xᵀ): determinant and quadratic form by the matrix of the predictors.
        design = predictors * included
        precision = np.eye(len(included)) / SLAB_VARIANCE + design.T @ design / NOISE_VARIANCE
        log_determinant = (
            np.linalg.slogdet(precision)[1]
            + len(included) * np.log(SLAB_VARIANCE)
            + len(response) * np.log(NOISE_VARIANCE)
        )
        projection = design.T @ response / NOISE_VARIANCE
        quadratic = response @ response / NOISE_VARIANCE - projection @ np.linalg.solve(precision, projection)
        log_likelihood = -0.5 * (len(response) * np.log(2 * np.pi) + log_determinant + quadratic)
        prior = np.where(included, INCLUSION, 1 - INCLUSION)
        log_joint[i] = log_likelihood + np.log(prior).sum()
    log_evidence = np.logaddexp.reduce(log_joint)
    return log_evidence, np.exp(log_joint - log_evidence) @ models


def learning_rate(num_steps):
    """Held while the likelihood is tempered, then a cosine."""
    return optax.warmup_cosine_decay_schedule(0.01, 0.01, num_steps // 2, num_steps)


def plot(found, log_evidence, predictors, inclusions, path):
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for (name, posterior), style in zip(found.items(), ("C0-", "C1--", "C2-.", "C4:")):
        starts = posterior.starts
        steps = np.flatnonzero(starts.inverse_temperature[0] == 1)  # before, the loss is that of a tempered likelihood
        window = max(len(steps) // 50, 1)
        smooth = np.convolve(-starts.losses[starts.best, steps], np.ones(window) / window, "valid")
        left.plot(steps[window - 1 :], smooth, style, label=name, lw=1.4)
    left.axhline(log_evidence, color="black", lw=1, ls="--", label="exact log evidence")
    left.set(xlabel="step", ylabel="objective (nats)", ylim=(log_evidence - 8, log_evidence + 0.5))
    left.legend(loc="center")
    position, width = np.arange(len(predictors)), 0.8 / len(inclusions)
    for i, ((name, values), color) in enumerate(zip(inclusions.items(), ("0.6", "C0", "C1"))):
        middle.bar(position + (i - (len(inclusions) - 1) / 2) * width, values, width, color=color, label=name)
    middle.set(xticks=position, xticklabels=predictors, ylabel="inclusion probability", ylim=(0, 1.3))
    middle.legend(loc="upper center", fontsize="small")
    plots.plot_agreement(found["VIMCOStar"], num_latents=5, ax=right)
    right.set_title(f"the four starts of VIMCOStar: {found['VIMCOStar'].verdict}", fontsize="medium")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args):
    data = load_diabetes(scaled=False)
    standardize = lambda x: jnp.asarray((x - x.mean(0)) / x.std(0), jnp.float32)  # noqa: E731
    predictors, response = standardize(data.data), standardize(data.target)
    log_evidence, exact_inclusion = exact_posterior(predictors, response)

    number = args.num_particles
    objectives = {
        "VIMCOStar": (VIMCOStar(0.5, number), 4),
        "VIMCO": (VIMCO(0.5, number), 1),
        "TraceGraph_ELBO": (TraceGraph_ELBO(number), 1),
        "plain pathwise": (VIMCOStar(0.5, number, doubly_reparameterized=False), 1),
    }
    found, errors = {}, {}
    print(f"{'objective':>16} {'starts':>7} {'fit (s)':>8} {'ELBO below the evidence':>24} {'ESS':>6} {'error':>6}")
    for name in ("VIMCOStar", *args.objectives):
        objective, num_starts = objectives[name]
        svi = SVI(model, guide, optax.adam(learning_rate(args.num_steps)), objective)
        start = time.perf_counter()
        found[name] = posterior = fit(
            svi, random.key(0), args.num_steps, predictors, response, num_starts=num_starts, progress_bar=False
        )
        seconds = time.perf_counter() - start
        posterior.diagnose(args.num_proposals, random.key(1))
        agreement = posterior.starts.agreement
        estimates = dict(zip(agreement["quantity"].values, agreement["pooled"].values))
        errors[name] = max(abs(estimates[f"included[{i}]"] - exact) for i, exact in enumerate(exact_inclusion))
        own = posterior.to_arviz(num_samples=args.num_proposals, resample=False, pool=False, groups=())  # by start
        gap = log_evidence - float(own["sample_stats"]["log_weight"].mean("draw").max())
        ess = posterior.ess / args.num_proposals
        print(f"{name:>16} {num_starts:7} {seconds:8.1f} {gap:19.2f} nats {ess:6.1%} {errors[name]:6.3f}", flush=True)

    posterior = found["VIMCOStar"]
    print(f"\nVIMCOStar, draws of its four starts pooled; the exact log evidence is {log_evidence:.3f}\n{posterior}")
    tree = posterior.to_arviz(
        rng_key=random.key(2),
        num_samples=args.num_proposals // 4,
        num_proposals=args.num_proposals,
        coords={"predictor": data.feature_names},
        groups=("posterior_predictive",),
    )
    inclusion = tree["posterior"]["included"].mean(("chain", "draw")).values
    inclusions = {"exact (1,024 models)": exact_inclusion, "VIMCOStar, importance-weighted": inclusion}
    if "TraceGraph_ELBO" in found:
        params = found["TraceGraph_ELBO"].params
        draws = guide.sample_posterior(random.key(3), params, predictors, response, sample_shape=(args.num_proposals,))
        inclusions["TraceGraph_ELBO, draws of its guide"] = np.asarray(draws["included"].mean(0))
    print(f"\nInclusion probabilities\n{'':>36} {' '.join(f'{name:>5}' for name in data.feature_names)}  error")
    for name, row in inclusions.items():
        error = np.abs(row - exact_inclusion).max()
        print(f"{name:>36} {' '.join(f'{value:5.3f}' for value in row)}  {error:5.3f}")

    args.output.mkdir(parents=True, exist_ok=True)
    tree.to_netcdf(str(args.output / "variable_selection.nc"))
    print(az.summary(tree, kind="stats", var_names=["included", "coefficient"]))
    picture = args.output / "variable_selection.png"
    plot(found, log_evidence, data.feature_names, inclusions, picture)
    print(f"\nSaved variable_selection.nc and variable_selection.png in {args.output}/")
    return found, errors, log_evidence


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--objectives", nargs="*", default=["TraceGraph_ELBO"], choices=["TraceGraph_ELBO", "VIMCO", "plain pathwise"],
        help="beside VIMCOStar",
    )  # fmt: skip
    parser.add_argument("--num-steps", type=int, default=4000)
    parser.add_argument("--num-particles", type=int, default=64)
    parser.add_argument("--num-proposals", type=int, default=40_000, help="draws of the guide to be weighted")
    parser.add_argument("--output", type=Path, default=Path("output"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
