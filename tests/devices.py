"""A program for test_scale.py: particles or data spread over devices give what one device gives.

    python tests/devices.py                      8 CPU devices in this process
    python tests/devices.py ADDRESS NUMBER ID    one CPU device in each of several processes

It prints "held" last.
"""

import os
import re
import sys

processes = sys.argv[1:]
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    f" --xla_force_host_platform_device_count={1 if processes else 8} "
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # compile faster
)

import jax  # noqa: E402

if processes:
    address, number, index = processes
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(number), int(index), initialization_timeout=60)

from jax import random  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402
import numpy as np  # noqa: E402
import numpyro  # noqa: E402
import numpyro.distributions as dist  # noqa: E402
from numpyro.infer import SVI  # noqa: E402

from numpyro_vimco import VIMCO, VIMCOStar  # noqa: E402

DEVICES = 8 if not processes else int(processes[1])
SHARE, DATA = 13, 11  # of one device; numbers that appear in no other shape
PARTICLES = 3 * SHARE * DEVICES
assert len(jax.devices()) == DEVICES
MESH = Mesh(np.array(jax.devices()), ("devices",))
SPREAD = NamedSharding(MESH, PartitionSpec("devices"))


def model(x):
    loc = numpyro.param("loc", np.zeros(5))
    with numpyro.plate("predictor", 5):
        b = numpyro.sample("b", dist.Bernoulli(0.3))
        c = numpyro.sample("c", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(jnp.cos(jnp.arange(len(x)))[:, None] * (loc + b * c) @ np.ones(5), 3.0), obs=x)


def guide(x):
    with numpyro.plate("predictor", 5):
        b = numpyro.sample("b", dist.Bernoulli(logits=numpyro.param("logits", 0.1 * np.ones(5))))
        numpyro.sample("c", dist.Normal(numpyro.param("mean", np.zeros(5)) + b, numpyro.param("width", np.ones(5))))


def plate_model(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("prior", 0.2)))
        numpyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)


def plate_guide(x):
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("slope", 0.5) * x))


def compiled(objective, programs, x):
    """Loss and gradients, from the compiled function, and the shapes that are in it."""
    svi = SVI(*programs, numpyro.optim.Adam(0.1), objective)
    params = svi.get_params(svi.init(random.key(0), np.zeros(3, np.float32)))
    params = jax.tree.map(np.asarray, params)

    def loss(params, x):
        return objective.loss(random.key(1), params, *programs, x)

    function = jax.jit(jax.value_and_grad(loss)).lower(params, x).compile()
    result = function(params, x)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(result))
    shapes = re.findall(r"\b[a-z]\w+\[([\d,]+)\]\{", function.as_text())
    return jax.tree.map(np.asarray, result), [[int(size) for size in shape.split(",")] for shape in shapes]


def agree(one, other):
    """Loss and gradients are equal to 1e-5."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one, other)


def whole(shapes):
    """Shapes of arrays that hold more of all particles than one number each (VIMCO's mean gathers log-weights)."""
    return [shape for shape in shapes if any(size % PARTICLES == 0 for size in shape) and np.prod(shape) > PARTICLES]


def particles_over_devices():
    x = np.linspace(-2, 2, 7, dtype=np.float32)
    programs = model, guide
    makes = [VIMCO, lambda **kwargs: VIMCOStar(doubly_reparameterized=False, **kwargs), VIMCOStar]
    for make in makes[-1:] if processes else makes:
        reference, shapes = compiled(make(num_particles=PARTICLES), programs, x)
        assert whole(shapes)
        result, shapes = compiled(make(num_particles=PARTICLES, particle_sharding=SPREAD), programs, x)
        agree(result, reference)
        assert [3 * SHARE, 5] in shapes and [3 * SHARE, 7] in shapes
        assert not whole(shapes)
    objective = VIMCOStar(num_particles=PARTICLES, particle_sharding=SPREAD, chunk_size=SHARE * DEVICES)
    result, shapes = compiled(objective, programs, x)
    agree(result, reference)
    assert [SHARE, 5] in shapes and [SHARE, 7] in shapes and [3 * SHARE, 5] not in shapes
    assert not whole(shapes) and not any(SHARE * DEVICES in shape for shape in shapes)


def data_over_devices():
    x = np.linspace(-2, 2, DATA * DEVICES, dtype=np.float32)
    spread = jax.make_array_from_callback(x.shape, SPREAD, lambda index: x[index])
    objective = VIMCOStar(num_particles=6)
    reference, shapes = compiled(objective, (plate_model, plate_guide), x)
    assert [6, DATA * DEVICES] in shapes
    result, shapes = compiled(objective, (plate_model, plate_guide), spread)
    agree(result, reference)
    assert [6, DATA] in shapes and [6, DATA * DEVICES] not in shapes


def steps_of_svi():
    x = np.linspace(-2, 2, 7, dtype=np.float32)
    losses = []
    for sharding in (None, SPREAD):
        svi = SVI(model, guide, numpyro.optim.Adam(0.1), VIMCOStar(num_particles=PARTICLES, particle_sharding=sharding))
        losses.append(svi.run(random.key(0), 5, x, progress_bar=False).losses)
    np.testing.assert_allclose(*map(np.asarray, losses), rtol=1e-5)


if __name__ == "__main__":
    particles_over_devices()
    data_over_devices()
    steps_of_svi()
    print("held", flush=True)
