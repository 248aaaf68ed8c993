# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

r"""Estimators of importance-weighted bounds, as pure functions of the log-weights.

Every function here takes ``log_weights`` of shape ``(num_particles, *plates)``, in nats, and reduces or
normalises over the first axis only: each plate element is a bound of its own. ``alpha`` is a Python float.
None of them is meant to be differentiated: :class:`~numpyro_vimco.ImportanceWeightedELBO` assembles the gradient.
The functions of local particles take the log-weights of one plate's M local particles in place of the N particles.

With :math:`w_j = p(x, z_j) / q(z_j)`, the VR-IWAE bound [1] and its score-function gradient are

.. math::

    L = \tfrac{1}{1-\alpha} E \left[\log \tfrac1N \sum_j w_j^{1-\alpha}\right], \qquad
    \nabla_\phi L = E \sum_j (\hat L - f_{-j} - W_j) \nabla_\phi \log q(z_j),

where :math:`\hat L` is the quantity inside the expectation, :math:`W_j` the normalized weight of particle j and
:math:`f_{-j}` any function of the other particles. An estimator is a choice of :math:`f_{-j}`; its *score
signal* is :math:`s_j = \hat L - f_{-j} - W_j`.

Conventions on degenerate weights, for every function:

- A particle of weight zero (``-inf``) has :math:`W_j = 0`. Its signal is the limit of the formula as
  :math:`w_j \to 0`. At α = 1 there is no limit: the signal is 0, and the other particles are centred without it.
- Where all other particles have weight zero, :math:`1 - W_j` is taken as the dtype's smallest normal number,
  so that the signal is finite (about 87 in float32, 708 in float64).
- NaN in gives NaN out.

**References**

1. Daudel et al. 2023, *Alpha-divergence Variational Inference Meets Importance Weighted Auto-Encoders*,
   arXiv 2210.06226
2. Mnih & Rezende 2016, *Variational Inference for Monte Carlo Objectives*, arXiv 1602.06725
3. Daudel et al. 2026, arXiv 2602.01412 (VIMCO-⋆)
4. Tucker et al. 2019, *Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives*, arXiv 1810.04152
"""

from collections.abc import Sequence
import math

import jax
from jax.nn import logsumexp
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = [
    "LogWeights",
    "PerParticle",
    "local_vimco_star_signal",
    "log_mean_weight",
    "log_one_minus_share",
    "normalized_weights",
    "path_factor",
    "reinforce_signal",
    "vimco_arithmetic_signal",
    "vimco_geometric_signal",
    "vimco_star_signal",
    "vr_iwae_bound",
]

LogWeights = Float[Array, "particles *plates"]
PerParticle = Float[Array, "particles *plates"]


def vr_iwae_bound(log_weights: LogWeights, alpha: float) -> Float[Array, "*plates"]:
    r"""Estimate :math:`\hat L` of the VR-IWAE bound [1], in nats: the IWAE bound at α = 0, the ELBO at α = 1."""
    if alpha == 1:
        return jnp.mean(log_weights, axis=0)
    log_mean = logsumexp((1 - alpha) * log_weights, axis=0) - jnp.log(log_weights.shape[0])
    return log_mean / (1 - alpha)


def normalized_weights(log_weights: LogWeights, alpha: float) -> PerParticle:
    r""":math:`W_j = w_j^{1-\alpha} / \sum_i w_i^{1-\alpha}`; all zero where every weight is zero."""
    if alpha == 1:
        return jnp.where(jnp.isneginf(log_weights), 0, 1 / log_weights.shape[0]).astype(log_weights.dtype)
    weights = jnp.exp(_shifted(log_weights, alpha))
    total = jnp.sum(weights, axis=0, keepdims=True)
    return weights / jnp.where(total == 0, 1, total)


def log_one_minus_share(log_weights: LogWeights, alpha: float) -> PerParticle:
    r""":math:`\log(1 - W_j)`: a leave-one-out logsumexp in O(N), accurate where W_j rounds to 1.

    At most one share exceeds 1/2. That one sums the others in log space; clipping it instead would bias the
    gradient by an unbounded amount.
    """
    shares = normalized_weights(log_weights, alpha)
    shifted = _shifted(log_weights, alpha)
    # By position, not as the one that is 0: the compiler may fuse the shift, and the largest is then not exactly 0.
    largest = jax.nn.one_hot(jnp.argmax(log_weights, axis=0), log_weights.shape[0], axis=0, dtype=bool)
    log_others = logsumexp(jnp.where(largest, -jnp.inf, shifted), axis=0, keepdims=True)
    log_others = jnp.where(jnp.isneginf(log_others), jnp.log(jnp.finfo(shifted.dtype).tiny), log_others)
    return jnp.where(shares <= 0.5, jnp.log1p(-shares), log_others - logsumexp(shifted, axis=0, keepdims=True))


def reinforce_signal(log_weights: LogWeights, alpha: float) -> PerParticle:
    r"""No baseline: :math:`s_j = \hat L - W_j`; 0 where the bound is ``-inf``."""
    bound = vr_iwae_bound(log_weights, alpha)[None]
    return jnp.where(jnp.isneginf(bound), 0, bound - normalized_weights(log_weights, alpha))


def vimco_arithmetic_signal(log_weights: LogWeights, alpha: float) -> PerParticle:
    r"""VIMCO [2] with the arithmetic mean: :math:`w_j^{1-\alpha}` is replaced by the mean of the others',

    .. math:: s_j = -\frac{\log(1 - W_j) + \log(1 + 1/(N-1))}{1-\alpha} - W_j.
    """
    if alpha == 1:
        return _centred(log_weights) - normalized_weights(log_weights, alpha)
    return _leave_one_out_signal(log_weights, alpha, constant=1.0)


def vimco_geometric_signal(log_weights: LogWeights, alpha: float) -> PerParticle:
    r"""VIMCO [2] with the geometric mean: :math:`w_j^{1-\alpha}` is replaced by :math:`g_j`, the geometric mean
    of the others',

    .. math:: s_j = -\frac{1}{1-\alpha} \log\left(1 - W_j + \frac{g_j}{\sum_i w_i^{1-\alpha}}\right) - W_j.
    """
    if alpha == 1:
        return vimco_arithmetic_signal(log_weights, alpha)
    shares = normalized_weights(log_weights, alpha)
    shifted = _shifted(log_weights, alpha)
    log_total = logsumexp(shifted, axis=0, keepdims=True)
    log_mean_share = _mean_of_others(shifted) - jnp.where(jnp.isneginf(log_total), 0, log_total)
    difference = shares - jnp.exp(log_mean_share)
    log_ratio = jnp.where(
        difference <= 0.5,
        jnp.log1p(-difference),
        jnp.logaddexp(log_one_minus_share(log_weights, alpha), log_mean_share),
    )
    return -log_ratio / (1 - alpha) - shares


def vimco_star_signal(log_weights: LogWeights, alpha: float) -> PerParticle:
    r"""VIMCO-⋆ [3]: the other particles' bound with a constant that cancels the signal's 1/N term,

    .. math::

        f_{-j} &= \tfrac{1}{1-\alpha} \log \tfrac1N \bigl(1 + \tfrac{\alpha}{N-1}\bigr) \sum_{i \ne j} w_i^{1-\alpha} \\
        s_j &= -\frac{\log(1 - W_j) + \log(1 + \alpha/(N-1))}{1-\alpha} - W_j.

    At α = 0 this is the paper's :math:`-\log(1 - W_j) - W_j = W_j^2/2 + W_j^3/3 + \ldots`. The constant for
    0 < α < 1 is derived in this project: it is the simple choice near the variance-minimising one, which is α times
    the variance of the score under the guide weighted by :math:`w^{1-\alpha}`, over that under the guide. As α → 1,
    :math:`s_j \to (\log w_j - \mathrm{mean}_{i \ne j} \log w_i) / N`,
    the leave-one-out estimator of the ELBO.
    """
    if alpha == 1:
        return _centred(log_weights)
    return _leave_one_out_signal(log_weights, alpha, constant=alpha)


def path_factor(log_weights: LogWeights, alpha: float) -> PerParticle:
    r""":math:`r_j = \alpha + (1-\alpha) W_j`, a factor of :math:`W_j` in doubly reparameterised gradients [4, 1]."""
    return alpha + (1 - alpha) * normalized_weights(log_weights, alpha)


def log_mean_weight(local_log_weights: LogWeights) -> Float[Array, "*plates"]:
    r""":math:`\log \tfrac1M \sum_m v_m`, the log-weight of a plate element with M local particles."""
    return vr_iwae_bound(local_log_weights, alpha=0.0)


def local_vimco_star_signal(
    log_one_minus_w: Float[Array, "*#plates"],
    share: Float[Array, "*#plates"],
    local_log_weights: LogWeights,
    alpha: float,
) -> PerParticle:
    r"""VIMCO-⋆ of the local particles of one global particle, derived in this project.

    With :math:`W` the normalized weight of the global particle and :math:`V_m = v_m / \sum_{m'} v_{m'}`,

    .. math:: s_m = -\tfrac{1}{1-\alpha} \log\bigl(1 - W [1 - (1 - V_m)^{1-\alpha}]\bigr) - W V_m,

    which is :math:`-\log(1 - u) - u` with :math:`u = W V_m` at α = 0, and :math:`(-\log(1 - V_m) - V_m)/N` at α = 1.

    :param log_one_minus_w: log(1 - W), of :func:`log_one_minus_share`.
    :param share: W. Both broadcast to an element of ``local_log_weights``.
    :param local_log_weights: log v_m in nats, of shape ``(local_particles, *plates)``.
    """
    log_one_minus_w, share = log_one_minus_w[None], share[None]
    local = normalized_weights(local_log_weights, 0.0)
    log_one_minus_v = log_one_minus_share(local_log_weights, 0.0)
    # s = h(x) / (1 - α) + W k with x = W [1 - (1 - V)^(1 - α)] and k = [1 - (1 - V)^(1 - α)] / (1 - α) - V,
    # each of second order in V: the difference of first-order terms would cancel.
    if alpha == 1:
        return share * _h(local, log_one_minus_v)
    log_others = (1 - alpha) * log_one_minus_v
    x = -share * jnp.expm1(log_others)
    log_rest = jnp.where(x <= 0.5, jnp.log1p(-x), jnp.logaddexp(log_one_minus_w, jnp.log(share) + log_others))
    if alpha == 0:
        return _h(x, log_rest)
    # k = α V²/2! + α (α+1) V³/3! + …
    rising = [math.prod((alpha + i) / (i + 2) for i in range(n)) for n in range(1, 8)]
    k = jnp.where(local < 0.01, _series(rising, local), -jnp.expm1(log_others) / (1 - alpha) - local)
    return _h(x, log_rest) / (1 - alpha) + share * k


def _leave_one_out_signal(log_weights: LogWeights, alpha: float, constant: float) -> PerParticle:
    """``-[log(1 - W) + log(1 + constant / (N - 1))] / (1 - alpha) - W``, without cancellation for small W."""
    shares = normalized_weights(log_weights, alpha)
    h = _h(shares, log_one_minus_share(log_weights, alpha))
    return (h + alpha * shares - jnp.log1p(constant / (log_weights.shape[0] - 1))) / (1 - alpha)


def _h(x: Array, log_one_minus_x: Array) -> Array:
    """``-log(1 - x) - x = x²/2 + x³/3 + …``, whose two terms cancel in floating point when x is small."""
    return jnp.where(x < 0.01, _series([1 / k for k in range(2, 9)], x), -log_one_minus_x - x)


def _series(coefficients: Sequence[float], x: Array) -> Array:
    """``x² (c₀ + c₁ x + …)``."""
    return x**2 * jnp.polyval(jnp.array(coefficients[::-1], x.dtype), x)


def _shifted(log_weights: LogWeights, alpha: float) -> PerParticle:
    """``(1 - alpha) * log_weights`` less its maximum over the particles; ``-inf`` where all weights are zero."""
    powers = (1 - alpha) * log_weights
    largest = jnp.max(powers, axis=0, keepdims=True)
    return powers - jnp.where(jnp.isneginf(largest), 0, largest)


def _mean_of_others(x: PerParticle) -> PerParticle:
    """Mean over the other particles. Sums from both ends: subtracting from the total would cancel."""
    zero = jnp.zeros_like(x[:1])
    before = jnp.concatenate([zero, jax.lax.cumsum(x[:-1])])
    after = jnp.concatenate([jax.lax.cumsum(x[1:], reverse=True), zero])
    return (before + after) / (x.shape[0] - 1)


def _centred(log_weights: LogWeights) -> PerParticle:
    r""":math:`(\log w_j - \mathrm{mean}_{i \ne j} \log w_i) / N`, which is (log w_j - mean) / (N - 1)."""
    shifted = _shifted(log_weights, alpha=0.0)
    zero = jnp.isneginf(shifted)
    count = jnp.maximum(jnp.sum(~zero, axis=0, keepdims=True), 1)
    mean = jnp.sum(jnp.where(zero, 0, shifted), axis=0, keepdims=True) / count
    return jnp.where(zero, 0, shifted - mean) / (log_weights.shape[0] - 1)
