"""What all starts have lost together: defensive draws find it, it is recovered, and verdict and findings say so."""

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

from helpers import codes, said
from numpyro_vimco import AutoMixed, VIMCOStar, fit
from numpyro_vimco.diagnostics.agreement import contradictions
from numpyro_vimco.draws.proposals import WeightedDraw
from numpyro_vimco.fitting.recovery import lost_share


def two_humps(x=None):
    """The posterior is 0.7 Normal(0, 1) + 0.3 Normal(7, 1), and its evidence is 1."""
    m = numpyro.sample("m", dist.Normal(0.0, 20.0))
    humps = jnp.logaddexp(
        jnp.log(0.7) + dist.Normal(0.0, 1.0).log_prob(m), jnp.log(0.3) + dist.Normal(7.0, 1.0).log_prob(m)
    )
    numpyro.factor("humps", humps - dist.Normal(0.0, 20.0).log_prob(m))


from_zero = partial(AutoNormal, init_loc_fn=init_to_value(values={"m": 0.0}))


def fitted(**options):
    schedule = optax.cosine_decay_schedule(0.02, 300)
    svi = SVI(two_humps, from_zero(two_humps), optax.adam(schedule), VIMCOStar(0.5, num_particles=32))
    posterior = fit(svi, random.key(0), 300, tempering=0, progress_bar=False, **options)
    posterior.diagnose(rng_key=random.key(1))
    return posterior


@pytest.fixture(scope="module")
def lost():
    return fitted(recover=False)


@pytest.fixture(scope="module")
def recovered():
    return fitted()


@pytest.mark.long
def test_a_part_that_no_start_draws_is_seen(lost):
    """Each start has at most 0.7 of the evidence, log 0.7 = -0.36."""
    assert (lost.starts.log_evidence < -0.25).all()
    assert not lost.starts.recovered and lost.verdict != "good"
    assert {"lost-by-guides", "several-humps"} <= set(codes(lost))
    assert "Defensive draws hold" in said(lost) and "num_components={'m': 2}" in said(lost)


@pytest.mark.long
def test_it_is_recovered(recovered):
    assert recovered.starts.recovered and recovered.losses.shape == (4, 300)
    assert abs(recovered.log_evidence) < 6 * recovered.log_evidence_std_error < 0.2
    of_m = recovered.starts.agreement.sel(quantity="m")
    assert abs(of_m["pooled"] - 2.1) < 6 * of_m["pooled_std_error"] < 1
    assert recovered.verdict != "bad"


@pytest.mark.long
def test_the_remedy_helps(lost):
    """The guide that the finding names holds both humps in each start."""
    (remedy,) = (finding.remedy for finding in lost.findings if finding.code == "several-humps")
    assert remedy == "AutoMixed(posterior.svi.model, num_components={'m': 2})"
    guide = eval(remedy, {"AutoMixed": AutoMixed, "posterior": lost})
    schedule = optax.warmup_cosine_decay_schedule(0.02, 0.02, 500, 1000)
    svi = SVI(two_humps, guide, optax.adam(schedule), VIMCOStar(0.5, num_particles=32))
    posterior = fit(svi, random.key(0), 1000, progress_bar=False)
    posterior.diagnose(rng_key=random.key(1))
    assert posterior.verdict == "good" and abs(posterior.log_evidence) < 0.05
    assert not posterior.starts.recovered


@pytest.mark.long
def test_a_good_fit_is_left_as_it_is():
    def model():
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(mu, 1.0), obs=1.0)

    def starts(recover):
        svi = SVI(model, AutoMixed(model), optax.adam(0.05), VIMCOStar())
        return fit(svi, random.key(0), 200, recover=recover, progress_bar=False).starts

    alone, looked_at = starts(False), starts(True)
    assert not looked_at.recovered
    for name, value in alone.params.items():
        np.testing.assert_array_equal(value, looked_at.params[name])


def test_share_that_the_defence_holds():
    """Two elements: in the first the guides propose all, in the second half of the weight."""
    share = np.log(np.array([[1.0, 1.0], [1.0, 0.25]]))
    draws = WeightedDraw({}, None, None, np.log(np.array([[1.0, 1.0], [3.0, 2.0]])), log_guide_share=share)
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
    assert contradictions(table(evidence, [0.005, 0.005], [900.0, 900.0], pooled, 0.005), {}) == expected


def test_few_draws_of_a_start_contradict_nothing():
    assert contradictions(table([0.0, 3.0], [0.005, 0.005], [900.0, 20.0], 0.0, 0.005), {}) == (False, False)
