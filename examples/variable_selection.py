"""Bayesian variable selection with a spike and a slab, where the truth is known.

    python examples/variable_selection.py

Ten predictors of diabetes progression (442 patients, scikit-learn's copy, standardised). Each has an inclusion
indicator, which is discrete, and a coefficient. With Gaussian noise and slab, the evidence of each of the 1,024
models has a closed form: exact inclusion probabilities and evidence, against which four objectives are held, with the
same automatic guide, particles and steps. "plain pathwise" is VIMCOStar with doubly_reparameterized=False.
"""

import argparse
import itertools
from pathlib import Path

import arviz as az
import jax
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

from numpyro_vimco import VIMCO, AutoMixed, VIMCOStar, importance_diagnostics, plots, to_arviz

INCLUSION, SLAB_VARIANCE, NOISE_VARIANCE = 0.3, 0.1, 0.5


def model(predictors, response):
    with numpyro.plate("predictor", predictors.shape[1]):
        included = numpyro.sample("included", dist.Bernoulli(INCLUSION))
        coefficient = numpyro.sample("coefficient", dist.Normal(0, SLAB_VARIANCE**0.5))
    mean = predictors @ (included * coefficient)
    with numpyro.plate("patient", len(response)):
        numpyro.sample("response", dist.Normal(mean, NOISE_VARIANCE**0.5), obs=response)


# Indicators, then coefficients given their own indicators: a Normal each for the spike and for the slab.
guide = AutoMixed(model, structure="conditional")


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


def fit(objective, num_steps, *data):
    """The inference object, its result, and mean and standard error of the final bound in nats."""
    svi = SVI(model, guide, optax.adam(0.01), objective)
    result = svi.run(random.key(0), num_steps, *data)
    keys = random.split(random.key(1), 200)
    losses = jax.jit(jax.vmap(lambda key: objective.loss(key, result.params, model, guide, *data)))(keys)
    return svi, result, -losses.mean(), losses.std() / len(keys) ** 0.5


def plot(fits, log_evidence, predictors, inclusion, exact_inclusion, diagnostics, path):
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    window = max(len(next(iter(fits.values()))[1].losses) // 100, 1)
    for (name, (_, result, *_)), style in zip(fits.items(), ("C0-", "C4--", "C1:", "C2-.")):
        smooth = np.convolve(-np.asarray(result.losses), np.ones(window) / window, "valid")
        left.plot(np.arange(len(smooth)) + window, smooth, style, label=name, lw=1.4)
    left.axhline(log_evidence, color="black", lw=1, ls="--", label="exact log evidence")
    left.set(xlabel="step", ylabel="bound (nats)", ylim=(log_evidence - 12, log_evidence + 1))
    left.legend(loc="center")
    position = np.arange(len(predictors))
    middle.bar(position - 0.2, exact_inclusion, 0.4, color="0.6", label="exact (1,024 models)")
    middle.bar(position + 0.2, inclusion, 0.4, color="C0", label="VIMCOStar, importance-weighted")
    middle.set(xticks=position, xticklabels=predictors, ylabel="inclusion probability", ylim=(0, 1.15))
    middle.legend(loc="upper center", ncols=2, fontsize="small")
    plots.plot_weights(diagnostics, ax=right)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args):
    data = load_diabetes(scaled=False)
    standardize = lambda x: jnp.asarray((x - x.mean(0)) / x.std(0), jnp.float32)  # noqa: E731
    predictors, response = standardize(data.data), standardize(data.target)
    log_evidence, exact_inclusion = exact_posterior(predictors, response)

    objectives = {
        "VIMCOStar": VIMCOStar(num_particles=args.num_particles),
        "plain pathwise": VIMCOStar(num_particles=args.num_particles, doubly_reparameterized=False),
        "VIMCO": VIMCO(num_particles=args.num_particles),
        "TraceGraph_ELBO": TraceGraph_ELBO(num_particles=args.num_particles),
    }
    fits = {}
    for name, objective in objectives.items():
        print(f"{name}, {args.num_particles} particles")
        fits[name] = fit(objective, args.num_steps, predictors, response)

    print(f"\n{'objective':>16} {'bound (nats)':>20} {'below the evidence':>20}")
    for name, (_, _, bound, error) in fits.items():
        print(f"{name:>16} {bound:12.3f} ± {error:5.3f} {log_evidence - bound:20.3f}")
    print(f"{'exact':>16} {log_evidence:12.3f}")

    svi, result, *_ = fits["VIMCOStar"]
    arguments = {"model_args": (predictors, response), "rng_key": random.key(2)}
    diagnostics = importance_diagnostics(svi, result, num_samples=args.num_proposals, **arguments)
    print(f"\nVIMCOStar's guide, by importance sampling\n{diagnostics}")
    posterior = to_arviz(
        svi,
        result,
        num_samples=args.num_proposals // 20,
        num_proposals=args.num_proposals,
        coords={"predictor": data.feature_names},
        **arguments,
    )
    inclusion = posterior["posterior"]["included"].mean(("chain", "draw")).values
    print("\nInclusion probabilities")
    print(f"{'':>8} {'weighted':>9} {'exact':>7}")
    for name, weighted, exact in zip(data.feature_names, inclusion, exact_inclusion):
        print(f"{name:>8} {weighted:9.3f} {exact:7.3f}")
    print(f"largest error {np.abs(inclusion - exact_inclusion).max():.3f}\n")

    args.output.mkdir(parents=True, exist_ok=True)
    posterior.to_netcdf(str(args.output / "variable_selection.nc"))
    print(az.summary(posterior, kind="stats", var_names=["included", "coefficient"]))
    picture = args.output / "variable_selection.png"
    plot(fits, log_evidence, data.feature_names, inclusion, exact_inclusion, diagnostics, picture)
    print(f"\nSaved variable_selection.nc and variable_selection.png in {args.output}/")
    gaps = {name: float(log_evidence - bound) for name, (_, _, bound, _) in fits.items()}
    return gaps, float(np.abs(inclusion - exact_inclusion).max())


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-steps", type=int, default=4000)
    parser.add_argument("--num-particles", type=int, default=128)
    parser.add_argument("--num-proposals", type=int, default=400_000, help="draws of the guide to be weighted")
    parser.add_argument("--output", type=Path, default=Path("output"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
