"""Change points: when did the level of the Nile change, if it did? Annual flow at Aswan, 1871 to 1970.

A switch for a new level in each year, and noise of unknown scale. Data: G. W. Cobb (1978), The problem of the Nile:
conditional solution to a changepoint problem, Biometrika 65, 243-251, in 10^8 cubic metres (R's `datasets::Nile`).
Truth: exact, by the sum over all segmentations, with quadrature over the scale of the noise.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy.special import logsumexp
from scipy.stats import halfnorm

from benchmarks.posteriors import Truth

CHANGE, PRIOR_SCALE = 0.03, 1.5
NUM_STEPS = 8000
# fmt: off
FLOW = np.array([
    1120, 1160, 963, 1210, 1160, 1160, 813, 1230, 1370, 1140, 995, 935, 1110, 994, 1020, 960, 1180, 799, 958, 1140,
    1100, 1210, 1150, 1250, 1260, 1220, 1030, 1100, 774, 840, 874, 694, 940, 833, 701, 916, 692, 1020, 1050, 969,
    831, 726, 456, 824, 702, 1120, 1100, 832, 764, 821, 768, 845, 864, 862, 698, 845, 744, 796, 1040, 759,
    781, 865, 845, 944, 984, 897, 822, 1010, 771, 676, 649, 846, 812, 742, 801, 1040, 860, 874, 848, 890,
    744, 749, 838, 1050, 918, 986, 797, 923, 975, 815, 1020, 906, 901, 1170, 912, 746, 919, 718, 714, 740,
])
# fmt: on


def data():
    return (jnp.asarray((FLOW - FLOW.mean()) / FLOW.std(), jnp.float32),)


def levels(first, switch, new):
    """The level of each year: that of the last switch."""
    changes = jnp.concatenate([jnp.zeros(1, int), switch]) == 1
    last = jax.lax.cummax(jnp.where(changes, jnp.arange(len(changes)), 0))
    return jnp.concatenate([first[None], new])[last]


def model(flow):
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    first = numpyro.sample("first", dist.Normal(0, PRIOR_SCALE))
    with numpyro.plate("later_year", len(flow) - 1):
        switch = numpyro.sample("switch", dist.Bernoulli(CHANGE))
        new = numpyro.sample("new", dist.Normal(0, PRIOR_SCALE))
    with numpyro.plate("year", len(flow)):
        numpyro.sample("flow", dist.Normal(levels(first, switch, new), noise), obs=flow)


def asked(draw, flow):
    return {
        "switch": draw["switch"],
        "num_changes": draw["switch"].sum(),
        "level": levels(draw["first"], draw["switch"], draw["new"]),
        "log_noise": jnp.log(draw["noise"]),
    }


def pymc_model(flow):
    import pymc as pm
    import pytensor.tensor as pt

    flow = np.asarray(flow)
    years = np.arange(len(flow))
    with pm.Model() as built:
        noise = pm.HalfNormal("noise", 1.0)
        first = pm.Normal("first", 0, PRIOR_SCALE)
        switch = pm.Bernoulli("switch", CHANGE, shape=len(flow) - 1)
        new = pm.Normal("new", 0, PRIOR_SCALE, shape=len(flow) - 1)
        changes = pt.concatenate([np.zeros(1, int), switch])
        last = pt.max(np.tri(len(flow), dtype=int) * (years * changes), axis=1)
        pm.Normal("flow", pt.concatenate([first[None], new])[last], noise, observed=flow)
    return built


class Segmentations:
    """The sum over all segmentations, given the scale of the noise.

    Segment (i, j) has the years from i up to, without, j. Arrays over segments have shape (n + 1, n + 1).
    """

    def __init__(self, flow, noise):
        n = len(flow)
        sums, squares = (np.concatenate([[0], np.cumsum(flow**power)]) for power in (1, 2))
        start, end = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
        length = np.maximum(end - start, 1)
        self.variance = 1 / (PRIOR_SCALE**-2 + length / noise**2)
        self.mean = self.variance * (sums[end] - sums[start]) / noise**2
        log_marginal = 0.5 * np.log(self.variance / PRIOR_SCALE**2) + 0.5 * self.mean**2 / self.variance
        log_marginal -= 0.5 * (length * np.log(2 * np.pi * noise**2) + (squares[end] - squares[start]) / noise**2)
        log_switches = np.where(start > 0, np.log(CHANGE), 0) + (length - 1) * np.log1p(-CHANGE)
        self.log_segment = np.where(end > start, log_marginal + log_switches, -np.inf)
        self._sum()

    def _sum(self):
        n = len(self.log_segment) - 1
        by_count = np.full((n + 1, n + 1), -np.inf)  # years that are covered, and by how many segments
        backward = np.full(n + 1, -np.inf)
        by_count[0, 0] = backward[n] = 0
        for j in range(1, n + 1):
            by_count[j, 1:] = logsumexp(by_count[:j, :-1] + self.log_segment[:j, j, None], 0)
        for i in range(n - 1, -1, -1):
            backward[i] = logsumexp(backward[i + 1 :] + self.log_segment[i, i + 1 :])
        forward = logsumexp(by_count, 1)
        self.log_evidence = forward[n]
        self.num_changes = np.exp(by_count[n, 1:] - forward[n])  # the probability of each number, from 0 on
        self.switch = np.exp(forward[1:n] + backward[1:n] - forward[n])
        self.segment = np.exp(forward[:, None] + self.log_segment + backward - forward[n])  # their probabilities

    def moments(self):
        """Of each quantity, its mean and its mean square."""
        number = np.arange(len(self.num_changes))
        n = len(number)
        holds = lambda x: np.array([(self.segment * x)[: t + 1, t + 1 :].sum() for t in range(n)])  # noqa: E731
        return {
            "switch": (self.switch, self.switch),
            "num_changes": (self.num_changes @ number, self.num_changes @ number**2),
            "level": (holds(self.mean), holds(self.mean**2 + self.variance)),
        }


def truth(flow, num_points=60):
    log_noise = np.linspace(np.log(0.4), np.log(1.4), num_points)
    given = [Segmentations(np.asarray(flow, float), noise) for noise in np.exp(log_noise)]
    log_prior = halfnorm.logpdf(np.exp(log_noise)) + log_noise + np.log(log_noise[1] - log_noise[0])
    log_joint = log_prior + [each.log_evidence for each in given]
    log_evidence = logsumexp(log_joint)
    weight = np.exp(log_joint - log_evidence)
    assert weight[[0, -1]].max() < 1e-6, "the grid of log_noise is too short"
    moments = [{**each.moments(), "log_noise": (x, x**2)} for each, x in zip(given, log_noise)]
    mean, square = (
        {name: np.tensordot(weight, [each[name][i] for each in moments], 1) for name in moments[0]} for i in (0, 1)
    )
    sds = {name: np.sqrt(square[name] - mean[name] ** 2) for name in mean}
    errors = {name: np.zeros_like(x) for name, x in mean.items()}
    return Truth(
        mean, sds, errors, float(log_evidence), 0.0, "exact: sum over segmentations, quadrature over the noise"
    )
