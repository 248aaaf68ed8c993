"""Two samplers of logistic regressions with a spike and a slab, many chains at a time (float64).

`PolyaGammaGibbs` draws the indicators with the coefficients integrated out, given Pólya-gamma variables (N. G. Polson,
J. G. Scott and J. Windle, 2013, JASA 108, 1339-1349). `LaplaceMetropolis` moves indicators by Laplace's approximation
of the evidence, and corrects its draws by importance weights. They share nothing but the prior.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import expit, gammaln, logsumexp

from benchmarks.posteriors import Truth, of_chains


class Prior(NamedTuple):
    """Of an intercept, and of coefficients with indicators."""

    inclusion: float
    slab_scale: float
    intercept_scale: float

    def precision(self, num_predictors):
        """Of intercept and slabs, the intercept first."""
        return np.append(self.intercept_scale**-2, np.full(num_predictors, self.slab_scale**-2))

    def logit(self):
        return np.log(self.inclusion / (1 - self.inclusion))

    def of_indicators(self, included):
        """Log-probabilities, of shape (chains,)."""
        return np.where(included[:, 1:], np.log(self.inclusion), np.log1p(-self.inclusion)).sum(1)


def quantities(included, weights):
    """What is asked, from indicators and weights of shape (..., 1 + predictors) with the intercept first."""
    return {
        "included": included[..., 1:].astype(float),
        "num_included": included[..., 1:].sum(-1).astype(float),
        "effect": np.where(included, weights, 0)[..., 1:],
        "intercept": weights[..., 0],
    }


class _Chains:
    """Indicators of shape (chains, 1 + predictors), the first always on, begun at draws from the prior."""

    def __init__(self, predictors, outcome, prior, num_chains, seed):
        predictors = np.asarray(predictors, float)
        self.rng = np.random.default_rng(seed)
        self.design = np.column_stack([np.ones(len(predictors)), predictors])
        self.outcome, self.prior = np.asarray(outcome, float), prior
        self.precision = prior.precision(predictors.shape[1])
        self.products = np.einsum("ni,nj->nij", self.design, self.design).reshape(len(predictors), -1)
        self.included = self.rng.random((num_chains, self.design.shape[1])) < prior.inclusion
        self.included[:, 0] = True

    def gram(self, case_weight):
        """X' diag(case_weight) X and the prior's precision, of shape (chains, 1 + predictors, 1 + predictors)."""
        k = len(self.precision)
        return (case_weight @ self.products).reshape(-1, k, k) + np.diag(self.precision)

    def only_included(self, precision, included):
        """Rows and columns of what is not included as in the prior."""
        both = included[:, :, None] & included[:, None, :]
        return np.where(both, precision, np.diag(self.precision))


class PolyaGammaGibbs(_Chains):
    """Gibbs sampling. Given Pólya-gamma variables the regression is linear with Gaussian noise.

    Indicators are drawn with all weights integrated out. For that the matrix [[Q, b], [b', 0]], of posterior precision
    and X'(y - 1/2), is swept on the weights that are included: its entries then say what each change would gain.
    """

    def run(self, num_sweeps, num_replaced=8, warm_up=500):
        """Draws of what is asked, of shape (chains, draws, ...), and their truth."""
        weights = np.zeros(self.included.shape)
        kept = []
        for sweep in range(warm_up + num_sweeps):
            weights = self._sweep(weights, num_replaced)
            if sweep >= warm_up:
                kept.append(quantities(self.included, weights))
        draws = {name: np.stack([each[name] for each in kept], 1) for name in kept[0]}
        return draws, of_chains(draws, "Pólya-gamma Gibbs sampling with collapsed indicators")

    def _sweep(self, weights, num_replaced):
        from polyagamma import random_polyagamma

        logits = np.where(self.included, weights, 0) @ self.design.T
        precision = self.gram(random_polyagamma(1, logits, random_state=self.rng))
        right = self.design.T @ (self.outcome - 0.5)
        self._begin(precision, right)
        for j in 1 + self.rng.permutation(len(right) - 1):
            log_odds = self.prior.logit() + self._gains()[:, j]
            wanted = self.rng.random(len(log_odds)) < expit(log_odds)
            self._pivot(np.flatnonzero(wanted != self.included[:, j]), j)
        for _ in range(num_replaced):
            self._replace()
        precision = self.only_included(precision, self.included)
        mean = np.linalg.solve(precision, np.where(self.included, right, 0)[..., None])[..., 0]
        noise = self.rng.normal(size=mean.shape)
        upper = np.linalg.cholesky(precision).swapaxes(1, 2)
        return mean + np.linalg.solve(upper, noise[..., None])[..., 0]

    def _begin(self, precision, right):
        chains, k = self.included.shape
        self.swept = np.zeros((chains, k + 1, k + 1))
        self.swept[:, :k, :k] = precision
        self.swept[:, :k, k] = self.swept[:, k, :k] = right
        on, self.included = self.included, np.zeros_like(self.included)
        for j in range(k):
            self._pivot(np.flatnonzero(on[:, j]), j)

    def _pivot(self, chains, j):
        """Sweep some chains' matrices on weight j, or undo it, and change its indicator."""
        if len(chains) == 0:
            return
        j = np.broadcast_to(j, chains.shape)
        matrix, rows = self.swept[chains], np.arange(len(chains))
        column, pivot = matrix[rows, :, j], matrix[rows, j, j][:, None]
        sign = np.where(self.included[chains, j], -1.0, 1.0)[:, None]
        matrix -= column[:, :, None] * (column / pivot)[:, None, :]
        matrix[rows, :, j] = matrix[rows, j, :] = sign * column / pivot
        matrix[rows, j, j] = -1 / pivot[:, 0]
        self.swept[chains] = matrix
        self.included[chains, j] ^= True

    def _gains(self):
        """What each weight adds to the log evidence beside the others, as it is in or out: (chains, 1 + predictors)."""
        diagonal = np.diagonal(self.swept, axis1=1, axis2=2)[:, :-1]
        slope = self.swept[:, :-1, -1]
        precision = np.where(self.included, -1 / diagonal, diagonal)
        return 0.5 * (slope**2 / np.abs(diagonal) + np.log(self.precision / precision))

    def _replace(self):
        """Take one predictor out at random, and put one in, perhaps the same, by its probability."""
        chains = np.flatnonzero(self.included[:, 1:].any(1))
        out = _first_of_random_order(self.included[chains, 1:], self.rng)
        self._pivot(chains, 1 + out)
        gains = np.where(self.included, -np.inf, self._gains())[chains, 1:]
        self._pivot(chains, 1 + np.argmax(gains + self.rng.gumbel(size=gains.shape), 1))


def _first_of_random_order(allowed, rng):
    """For each row the index of one allowed element, all with the same probability."""
    return np.argmax(np.where(allowed, rng.random(allowed.shape), -1), 1)


class LaplaceMetropolis(_Chains):
    """Metropolis-Hastings over the indicators, with Laplace's approximation of each model's evidence.

    What is kept gets importance weights: draws around the mode, against the approximation. Their expectation is the
    ratio of the true evidence to Laplace's, so that weighted averages converge to those of the posterior.
    """

    num_newton, degrees = 8, 8.0

    def run(self, num_steps, every=10, num_draws=20):
        """The truth, with standard errors over chains."""
        state = self.laplace(self.included, np.zeros(self.included.shape))
        sums = []
        for step in range(num_steps):
            state = self._step(state)
            if step >= num_steps // 5 and step % every == 0:
                sums.append(self._weighted(self.included, state, num_draws))
        return self._truth({name: sum(each[name] for each in sums) for name in sums[0]})

    def laplace(self, included, start):
        """Log evidence by Laplace, with the prior of the indicators; the mode; and the precision at it."""
        mode = np.where(included, start, 0)
        for _ in range(self.num_newton):
            probability = expit(mode @ self.design.T)
            precision = self.only_included(self.gram(probability * (1 - probability)), included)
            gradient = (self.outcome - probability) @ self.design - mode * self.precision
            step = np.linalg.solve(precision, np.where(included, gradient, 0)[..., None])[..., 0]
            step /= np.maximum(1, np.linalg.norm(step, axis=1, keepdims=True) / 3)
            mode = mode + step
            if np.abs(step).max() < 1e-5:
                break
        log_det = np.linalg.slogdet(precision)[1] - np.log(self.precision).sum()
        log_evidence = self.log_likelihood(mode) - 0.5 * (mode**2 @ self.precision + log_det)
        return self.prior.of_indicators(included) + log_evidence, mode, precision

    def log_likelihood(self, weights):
        logits = weights @ self.design.T
        return logits @ self.outcome - np.logaddexp(0, logits).sum(-1)

    def _step(self, state):
        """Change one indicator, or exchange one that is on for one that is off."""
        log_evidence, mode, _ = state
        chains, k = self.included.shape
        rows, proposed = np.arange(chains), self.included.copy()
        proposed[rows, 1 + self.rng.integers(k - 1, size=chains)] ^= True
        can = self.included[:, 1:].any(1) & ~self.included[:, 1:].all(1) & (self.rng.random(chains) < 0.5)
        out, new = (_first_of_random_order(x, self.rng) for x in (self.included[:, 1:], ~self.included[:, 1:]))
        exchanged = self.included.copy()
        exchanged[rows, 1 + out], exchanged[rows, 1 + new] = False, True
        proposed = np.where(can[:, None], exchanged, proposed)
        # Exchanges keep the number that are on. Where none can be exchanged, one is changed for sure: both ways differ.
        fixed = lambda x: ~x[:, 1:].any(1) | x[:, 1:].all(1)  # noqa: E731
        log_forward, log_back = (np.where(fixed(x), 0, np.log(0.5)) for x in (self.included, proposed))
        new_state = self.laplace(proposed, mode)
        ratio = new_state[0] - log_evidence + np.where(can, 0, log_back - log_forward)
        accepted = np.log(self.rng.random(chains)) < ratio
        self.included = np.where(accepted[:, None], proposed, self.included)
        return tuple(np.where(accepted.reshape(-1, *[1] * (x.ndim - 1)), y, x) for x, y in zip(state, new_state))

    def importance(self, included, state, num_draws):
        """Draws of the weights of shape (chains, draws, ...), and log-weights against Laplace's evidence."""
        log_evidence, mode, precision = state
        number = included.sum(1)[:, None]
        noise = np.where(included[:, None], self.rng.normal(size=(len(mode), num_draws, mode.shape[1])), 0)
        scale = np.sqrt(self.degrees / self.rng.chisquare(self.degrees, (len(mode), num_draws)))
        upper = np.linalg.cholesky(precision).swapaxes(1, 2)
        moved = np.linalg.solve(upper, noise.swapaxes(1, 2)).swapaxes(1, 2)
        weights = np.where(included[:, None], mode[:, None] + moved * scale[..., None], 0)
        nu = self.degrees
        log_t = gammaln((nu + number) / 2) - gammaln(nu / 2) - 0.5 * number * np.log(nu / 2)  # times (2π)^(number / 2)
        log_t = log_t - (nu + number) / 2 * np.log1p((noise**2).sum(-1) * scale**2 / nu)
        log_det = np.linalg.slogdet(precision)[1] - np.log(self.precision).sum()
        log_joint = self.log_likelihood(weights) - 0.5 * weights**2 @ self.precision
        log_joint += self.prior.of_indicators(included)[:, None]
        return weights, log_joint - log_t - 0.5 * log_det[:, None] - log_evidence[:, None]

    def _weighted(self, included, state, num_draws):
        """Sums over draws of weight, and of weight times each quantity and its square: by chain."""
        weights, log_weight = self.importance(included, state, num_draws)
        found = quantities(np.broadcast_to(included[:, None], weights.shape), weights)
        weight = np.exp(log_weight)
        times = lambda x: np.einsum("cd,cd...->c...", weight, x)  # noqa: E731
        powers = {(name, p): times(x**p) for name, x in found.items() for p in (1, 2)}
        return powers | {"weight": weight.sum(1)}

    def _truth(self, sums):
        weight = sums.pop("weight")
        mean, square = ({n: x.sum(0) / weight.sum() for (n, p), x in sums.items() if p == power} for power in (1, 2))
        errors = {}
        for name, x in mean.items():
            apart = sums[name, 1] - weight.reshape(-1, *[1] * x.ndim) * x
            errors[name] = apart.std(0, ddof=1) * len(weight) ** 0.5 / weight.sum()
        sds = {name: np.sqrt(np.maximum(square[name] - x**2, 0)) for name, x in mean.items()}
        return Truth(mean, sds, errors, None, 0.0, "Metropolis-Hastings on Laplace's evidence, importance-weighted")


def with_evidence(truth, metropolis, draws, num_models=500, num_draws=4000):
    """Add the log evidence: that of some models by importance sampling, over their share of another sampler's draws.

    The models are the most frequent of half of the chains; the other half say what their share is.
    """
    included = draws["included"] > 0.5
    codes = included @ (1 << np.arange(included.shape[-1], dtype=np.int64))
    half = len(codes) // 2
    models, first, count = np.unique(codes[:half], return_index=True, return_counts=True)
    often = np.argsort(-count)[:num_models]
    share = of_chains({"": np.isin(codes[half:], models[often])}, "")
    rows = included[:half].reshape(-1, included.shape[-1])[first[often]]
    log_evidence, variance = np.empty(len(rows)), np.empty(len(rows))
    for i, row in enumerate(np.column_stack([np.ones(len(rows), bool), rows])[:, None]):
        state = metropolis.laplace(row, np.zeros(row.shape))
        log_weight = metropolis.importance(row, state, num_draws)[1][0]
        log_mean = logsumexp(log_weight) - np.log(num_draws)
        log_evidence[i], variance[i] = state[0][0] + log_mean, np.exp(log_weight - log_mean).var() / num_draws
    total = logsumexp(log_evidence)
    error = np.sqrt(np.exp(2 * (log_evidence - total)) @ variance + (share.errors[""] / share.means[""]) ** 2)
    return truth._replace(log_evidence=float(total - np.log(share.means[""])), log_evidence_error=float(error))
