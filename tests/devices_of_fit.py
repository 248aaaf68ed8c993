"""A program for test_fit.py: starts spread over two CPU devices give what one device gives.

    python tests/devices_of_fit.py

It prints "held" last.
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"  # compile faster
)

import jax
from jax import random
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI
import optax

from numpyro_vimco import VIMCOStar, fit
from numpyro_vimco.fitting.steps import Steps
from numpyro_vimco.fitting.tempering import geometric

assert len(jax.devices()) == 2
SPREAD = NamedSharding(Mesh(np.array(jax.devices()), ("starts",)), PartitionSpec("starts"))


def model(x):
    with numpyro.plate("switch", 2):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
    numpyro.sample("x", dist.Normal(z.sum(), 1.0), obs=x)


def guide(x):
    logits = numpyro.param("logits", lambda key: random.normal(key, (2,)))
    with numpyro.plate("switch", 2):
        numpyro.sample("z", dist.Bernoulli(logits=logits))


def run(num_steps, **options):
    svi = SVI(model, guide, optax.adam(0.05), VIMCOStar(0.5, 4))
    options = {"tempering": lambda step: 0.5, "num_starts": 2, "progress_bar": False, **options}
    return fit(svi, random.key(0), num_steps, 0.7, **options)


if __name__ == "__main__":
    one, two = run(20), run(12, start_sharding=SPREAD)
    close = {"rtol": 1e-5, "atol": 1e-6}  # a loss near 0 is a difference of terms near 1
    np.testing.assert_allclose(two.losses, one.losses[:, :12], **close)
    logits = two.state.svi.optim_state[1][0]["logits"]
    assert logits.sharding.is_equivalent_to(SPREAD, 2) and logits.sharding.shard_shape(logits.shape) == (1, 2)
    assert np.isfinite(two.starts.log_evidence).all() and np.isfinite(two.params["logits"]).all()
    # One device goes on where two stopped.
    state = jax.device_put(two.state, jax.devices()[0])
    rest = run(8, init_state=state)
    np.testing.assert_allclose(rest.losses, one.losses[:, 12:], **close)
    # And two where one did.
    rest = run(8, init_state=state, start_sharding=SPREAD)
    np.testing.assert_allclose(rest.losses, one.losses[:, 12:], **close)
    # Data that are spread stay so: each device has 7 of 14.
    x = jax.device_put(np.linspace(-1, 1, 14, dtype=np.float32), NamedSharding(SPREAD.mesh, PartitionSpec("starts")))
    svi = SVI(model, guide, optax.adam(0.05), VIMCOStar(0.5, 4))
    state = fit(svi, random.key(0), 0, x, num_starts=1, progress_bar=False).state
    steps = Steps(svi, (x,), {}, {}, geometric, False, True, None)
    program = steps._program._program((state, 1))
    text = program.func.lower(*program.args, state, 1).compile().as_text()
    assert "f32[7]" in text and "f32[14]" not in text and "f32[4,14]" not in text
    print("held", flush=True)
