"""Signal-to-noise ratio of score-function gradients against the number of particles."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest

from helpers import UNBIASED, ScoreNormal

DIMENSIONS, OFFSET, DRAWS = 5, 0.2, 2000
NUM_PARTICLES = np.array([16, 64, 256, 1024])


def model():
    numpyro.sample("z", ScoreNormal(jnp.zeros(DIMENSIONS), 1.0).to_event(1))


def guide():
    numpyro.sample("z", ScoreNormal(numpyro.param("loc", jnp.full(DIMENSIONS, OFFSET)), 1.0).to_event(1))


def slope(make_objective):
    """Least-squares slope of log SNR against log N; the SNR is that of one coordinate of the location, averaged."""
    snr = []
    for num_particles in NUM_PARTICLES:
        objective = make_objective(0.0, int(num_particles))

        def gradient(key, objective=objective):
            params = {"loc": jnp.full(DIMENSIONS, OFFSET)}
            return jax.grad(lambda params: objective.loss(key, params, model, guide))(params)["loc"]

        keys = jax.random.split(jax.random.key(0), DRAWS)
        draws = jax.jit(lambda keys: jax.lax.map(gradient, keys, batch_size=100))(keys)
        snr.append(np.mean(np.abs(draws.mean(0)) / draws.std(0)))
    return np.polyfit(np.log(NUM_PARTICLES), np.log(snr), 1)[0]


# The standard error of a mean SNR of 1 over 2,000 draws and 5 coordinates is 1.2 %, that of the slope 0.006: over 6
# standard errors separate 0.5 ± 0.03, and the bounds are further. A lost 1/N term gives -0.5.
def test_snr_of_vimco_star_grows_like_the_square_root_of_n():
    assert 0.4 < slope(UNBIASED["VIMCOStar"]) < 0.6


# With VIMCO the SNR falls from 0.2 to the noise floor of its own estimate, 0.8 / sqrt(2,000) = 0.018: the slope is
# about -0.5, with a standard error of 0.1.
@pytest.mark.parametrize("name", ["VIMCO geometric", "VIMCO arithmetic"])
def test_snr_of_vimco_falls(name):
    assert slope(UNBIASED[name]) < 0
