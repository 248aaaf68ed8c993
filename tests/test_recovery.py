"""What all starts have lost together: defensive draws find it, it is recovered, and verdict and advice say so."""

from functools import partial

from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, init_to_value
from numpyro.infer.autoguide import AutoNormal
import optax
import pytest
import xarray as xr

from numpyro_vimco import AutoMixed, VIMCOStar, fit, importance_diagnostics
from numpyro_vimco.diagnostics.agreement import contradictions
from numpyro_vimco.draws.proposals import Draw
from numpyro_vimco.fitting.recovery import lost_share


def two_humps(x=None):
    """The posterior is 0.7 Normal(0, 1) + 0.3 Normal(7, 1), and its evidence is 1."""
    m = numpyro.sample("m", dist.Normal(0.0, 20.0))
    humps = jnp.logaddexp(
        jnp.log(0.7) + dist.Normal(0.0, 1.0).log_prob(m), jnp.log(0.3) + dist.Normal(7.0, 1.0).log_prob(m)
    )
    numpyro.factor("humps", humps - dist.Normal(0.0, 20.0).log_prob(m))


from_zero = partial(AutoNormal, init_loc_fn=init_to_value(values={"m": 0.0}))


def fitted(guide, **kwargs):
    schedule = optax.cosine_decay_schedule(0.02, 300)
    svi = SVI(two_humps, guide, optax.adam(schedule), VIMCOStar(0.5, num_particles=32))
    return svi, fit(svi, random.key(0), 300, anneal=0, progress_bar=False, **kwargs)


@pytest.fixture(scope="module")
def lost():
    svi, result = fitted(from_zero(two_humps), recover=False)
    return result, importance_diagnostics(svi, result, rng_key=random.key(1), progress_bar=False)


@pytest.fixture(scope="module")
def recovered():
    svi, result = fitted(from_zero(two_humps))
    return result, importance_diagnostics(svi, result, rng_key=random.key(1), progress_bar=False)


@pytest.mark.long
def test_a_part_that_no_start_draws_is_seen(lost):
    """Each start has at most 0.7 of the evidence, log 0.7 = -0.36."""
    result, found = lost
    assert (result.log_evidence < -0.25).all()
    assert not result.recovered and found.reading != "good"
    assert "Defensive draws hold" in found.advice and "num_components={'m': 2}" in found.advice


@pytest.mark.long
def test_it_is_recovered(recovered):
    result, found = recovered
    assert result.recovered and result.losses.shape == (4, 300)
    assert abs(found.log_evidence) < 6 * found.log_evidence_std_error < 0.2
    pooled = found.agreement["pooled"].sel(quantity="m")
    assert abs(pooled - 2.1) < 6 * found.agreement["pooled_std_error"].sel(quantity="m") < 1
    assert found.reading != "bad"


@pytest.mark.long
def test_the_advice_helps(lost):
    """The guide that the advice names holds both humps in each start."""
    guide = AutoMixed(two_humps, num_components={"m": 2})
    schedule = optax.warmup_cosine_decay_schedule(0.02, 0.02, 500, 1000)
    svi = SVI(two_humps, guide, optax.adam(schedule), VIMCOStar(0.5, num_particles=32))
    result = fit(svi, random.key(0), 1000, progress_bar=False)
    found = importance_diagnostics(svi, result, rng_key=random.key(1), progress_bar=False)
    assert "num_components={'m': 2}" in lost[1].advice
    assert found.reading == "good" and abs(found.log_evidence) < 0.05
    assert not result.recovered


@pytest.mark.long
def test_a_good_fit_is_left_as_it_is():
    def model():
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(mu, 1.0), obs=1.0)

    def fitted(recover):
        svi = SVI(model, AutoMixed(model), optax.adam(0.05), VIMCOStar())
        return fit(svi, random.key(0), 200, recover=recover, progress_bar=False)

    alone, looked_at = fitted(False), fitted(True)
    assert not looked_at.recovered
    for name, value in alone.params.items():
        np.testing.assert_array_equal(value, looked_at.params[name])


def test_share_that_the_defence_holds():
    """Two elements: in the first the guides propose all, in the second half of the weight."""
    share = np.log(np.array([[1.0, 1.0], [1.0, 0.25]]))
    draws = Draw({}, None, None, np.log(np.array([[1.0, 1.0], [3.0, 2.0]])), log_guide_share=share)
    np.testing.assert_allclose(lost_share(draws), 1 - (1 + 2 * 0.25) / 3)


def table(evidence, error, ess, pooled, pooled_error):
    return xr.Dataset(
        {
            "log_evidence": ("start", evidence),
            "log_evidence_std_error": ("start", error),
            "ess": ("start", ess),
            "pooled": ("quantity", [pooled, 0.0]),
            "pooled_std_error": ("quantity", [pooled_error, 1.0]),
        },
        coords={"quantity": ["log evidence", "m"]},
    )


@pytest.mark.parametrize(
    "evidence, pooled, expected",
    [
        ([0.0, 0.01], 0.0, (False, False)),
        ([0.0, 0.3], 0.0, (True, False)),  # three that agree are no vote
        ([0.0, 0.0], 0.08, (False, True)),  # all are sure, and the pool has more than each
        ([-5.0, 0.0], 0.01, (False, False)),  # one is stuck
    ],
)
def test_starts_and_pool_that_contradict_each_other(evidence, pooled, expected):
    assert contradictions(table(evidence, [0.005, 0.005], [900.0, 900.0], pooled, 0.005)) == expected


def test_few_draws_of_a_start_contradict_nothing():
    assert contradictions(table([0.0, 3.0], [0.005, 0.005], [900.0, 20.0], 0.0, 0.005)) == (False, False)
