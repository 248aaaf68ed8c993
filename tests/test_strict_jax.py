"""JAX's own checks pass: tracer leaks, and rank promotion, wherever NumPyro's pass."""

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import mask
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoNormal
import optax
import pytest

from helpers import of_two_lengths
from numpyro_vimco import REINFORCE, VIMCO, AutoMixed, ReweightedWakeSleep, VIMCOStar

# The check of leaks looks at all objects, of which other tests have left millions: it would take minutes.
pytestmark = pytest.mark.usefixtures("no_programs_of_others")

X = jnp.array([[0.5, 1.0], [2.0, 1.5], [0.2, 0.1]])


def model(x):
    loc = numpyro.sample("loc", dist.Normal(jnp.zeros(2), 1).to_event(1))
    with numpyro.plate("row", 3):
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        c = numpyro.sample("c", dist.Normal(0.0, 1.0))
        with mask(mask=jnp.arange(3) > 0):
            mean = (z + c)[:, None] + loc[None]
            numpyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)


def common(x):
    with numpyro.plate("row", 3):
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        c = numpyro.sample("c", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal((z + c)[:, None], 1.0).to_event(1), obs=x[:, :1])


OBJECTIVES = {
    "VIMCOStar": VIMCOStar(0.3, 4),
    "alpha 1": VIMCOStar(1.0, 4, doubly_reparameterized=False),
    "chunks": VIMCOStar(0.3, 4, chunk_size=2),
    "local": VIMCOStar(0.3, 4, plate_particles={"row": 3}),
    "VIMCO": VIMCO(0.3, 4),
    "REINFORCE": REINFORCE(0.3, 4),
    "RWS": ReweightedWakeSleep(4),
}


@pytest.fixture(params=["jax_numpy_rank_promotion", "jax_check_tracer_leaks"])
def strict(request):
    before = getattr(jax.config, request.param)
    jax.config.update(request.param, "raise" if request.param.endswith("promotion") else True)
    yield
    jax.config.update(request.param, before)


@pytest.mark.parametrize(
    "name, program",
    of_two_lengths(
        [*((name, model) for name in OBJECTIVES), ("VIMCOStar", common), ("RWS", common)],
        [("VIMCOStar", model), ("VIMCOStar", common)],
    ),
)
def test_objectives(strict, name, program):
    svi = SVI(program, AutoMixed(program, structure="mean_field"), optax.adam(0.05), OBJECTIVES[name])
    state = svi.init(random.key(0), X)
    jax.eval_shape(lambda state, x: svi.update(state, x)[1], state, X)  # ranks and leaks show in a trace


def test_continuous_guide_of_numpyro(strict):
    def program(x):
        loc = numpyro.sample("loc", dist.Normal(jnp.zeros(2), 1).to_event(1))
        with numpyro.plate("row", 3):
            numpyro.sample("x", dist.Normal(jnp.broadcast_to(loc, (3, 2)), 1.0).to_event(1), obs=x)

    svi = SVI(program, AutoNormal(program), optax.adam(0.05), VIMCOStar(0.3, 4))
    state = svi.init(random.key(0), X)
    assert np.isfinite(svi.update(state, X)[1])
