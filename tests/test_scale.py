"""Chunks of particles, many devices, and fits that stop and go on."""

import importlib.util
from pathlib import Path
import socket
import subprocess
import sys

import jax
from jax import random
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import scale
from numpyro.infer import SVI
import optax
import orbax.checkpoint
import pytest

from helpers import initial_params, of_two_lengths
from numpyro_vimco import REINFORCE, VIMCO, ReweightedWakeSleep, VIMCOStar

HERE = Path(__file__).parent
X = np.array([0.7, -1.2, 0.4])


def normal(name, loc, width=0.8):
    return numpyro.sample(name, dist.Normal(loc, width))


def bernoulli(name, logits):
    return numpyro.sample(name, dist.Bernoulli(logits=logits))


def global_latents():
    """Discrete and path sites, a Delta, a scaled site and a factor, in one weight."""

    def model():
        b = bernoulli("b", numpyro.param("prior", 0.2))
        c = normal("c", 0.5 * b, 1.0)
        d = normal("d", c)
        with numpyro.plate("data", 3):
            numpyro.sample("x", dist.Normal(numpyro.param("effect", 1.1) * c + b + d, 1.0), obs=X)

    def guide():
        b = bernoulli("b", numpyro.param("b_logits", 0.1))
        with scale(scale=0.7):
            c = normal("c", numpyro.param("c_loc", 0.3) + numpyro.param("coupling", 0.4) * b)
        numpyro.sample("d", dist.Delta(numpyro.param("d_slope", 0.5) * c, 0.1 * c))
        numpyro.factor("tilt", 0.2 * numpyro.param("tilt_by", 0.5) * b * c)

    return model, guide


def common_plate():
    """A bound for each element of a subsampled plate."""

    def model():
        with numpyro.plate("data", 3, subsample_size=2) as i:
            z = bernoulli("z", numpyro.param("prior", 0.2))
            c = normal("c", z, 1.0)
            numpyro.sample("x", dist.Normal(numpyro.param("effect", 1.1) * c, 1.0), obs=jnp.take(X, i))

    def guide():
        with numpyro.plate("data", 3, subsample_size=2) as i:
            z = bernoulli("z", numpyro.param("slope", 0.6) * jnp.take(X, i))
            normal("c", numpyro.param("c_slope", 0.2) * z)

    return model, guide


def local_particles(subsample_size=None):
    """Discrete and path sites on both levels."""

    def model():
        g = bernoulli("g", numpyro.param("prior", 0.2))
        h = normal("h", g, 1.0)
        with numpyro.plate("data", 3, subsample_size=subsample_size) as i:
            z = bernoulli("z", 0.8 * g + 0.3 * h)
            y = normal("y", z + h, 1.0)
            numpyro.sample("x", dist.Normal(numpyro.param("effect", 1.1) * y, 1.0), obs=jnp.take(X, i))

    def guide():
        g = bernoulli("g", numpyro.param("g_logits", 0.1))
        h = normal("h", numpyro.param("h_loc", 0.3) + 0.2 * g)
        with numpyro.plate("data", 3, subsample_size=subsample_size) as i:
            z = bernoulli("z", numpyro.param("z_slope", 0.5) * jnp.take(X, i) + 0.4 * h)
            normal("y", numpyro.param("y_loc", 0.2) * z + 0.3 * h)

    return model, guide


FAST_TO_COMPILE = {"xla_backend_optimization_level": 0}


def gradient(objective, programs, forward_mode=False):
    def loss(params):
        return (objective.loss(random.key(3), params, *programs),) * 2

    transform = jax.jacfwd if forward_mode else jax.grad
    compiled = jax.jit(transform(loss, has_aux=True), compiler_options=FAST_TO_COMPILE)
    return compiled(initial_params(*programs))


LOCAL = {"plate_particles": {"data": 2}}
CASES = {
    **{f"global latents, alpha={alpha}": (VIMCOStar, global_latents(), {"alpha": alpha}) for alpha in (0, 0.5, 1)},
    "global latents, plain": (VIMCOStar, global_latents(), {"doubly_reparameterized": False}),
    "all particles in sequence": (VIMCOStar, global_latents(), {"vectorize_particles": False}),
    "forward mode": (VIMCOStar, global_latents(), {"vectorize_particles": lambda fn, xs: jax.vmap(fn)(xs)}),
    "common plate": (VIMCOStar, common_plate(), {"alpha": 0.5}),
    "VIMCO": (VIMCO, common_plate(), {}),
    "REINFORCE": (REINFORCE, common_plate(), {}),
    "ReweightedWakeSleep": (ReweightedWakeSleep, common_plate(), {}),
    **{
        f"local particles, alpha={alpha}": (VIMCOStar, local_particles(), LOCAL | {"alpha": alpha})
        for alpha in (0, 0.5)
    },
    "local particles, alpha=1, subsampled": (VIMCOStar, local_particles(2), LOCAL | {"alpha": 1}),
    "local particles, plain": (VIMCOStar, local_particles(), LOCAL | {"doubly_reparameterized": False}),
}


SHORT = ("common plate", "local particles, alpha=0.5")


@pytest.mark.parametrize("case", of_two_lengths(CASES, SHORT))
def test_chunks_give_the_loss_and_gradient_of_all_particles_at_once(case, x64):
    make, programs, options = CASES[case]
    forward = case == "forward mode"
    whole = gradient(make(num_particles=6, **options), programs)
    chunked = gradient(make(num_particles=6, chunk_size=2, **options), programs, forward)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), chunked, whole)


def test_chunks_in_single_precision():
    whole = gradient(VIMCOStar(num_particles=512), common_plate())
    chunked = gradient(VIMCOStar(num_particles=512, chunk_size=64), common_plate())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), chunked, whole)


def load_benchmark(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", HERE.parent / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def temp_size(objective, model, guide, *data):
    svi = SVI(model, guide, optax.adam(1e-3), objective)
    compiled = jax.jit(svi.update).lower(svi.init(random.key(0), *data), *data).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # scikit-learn's own
def test_memory_of_a_chunk_on_the_digits():
    common = load_benchmark("common")
    programs = common.belief_network, common.recognition_network, common.digits()[:128]
    one_chunk = temp_size(VIMCOStar(num_particles=256), *programs)
    assert temp_size(VIMCOStar(num_particles=4096, chunk_size=256), *programs) < 1.3 * one_chunk


@pytest.mark.parametrize("doubly_reparameterized", of_two_lengths([True, False], [False]))
def test_neither_samples_nor_parameters_are_kept_for_every_chunk(doubly_reparameterized):
    def model():
        z = numpyro.sample("z", dist.Normal(0, 1).expand([500]).to_event(1))
        loc = numpyro.param("weights", lambda key: random.normal(key, (500, 100))).T @ z
        numpyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=jnp.zeros(100))

    def guide():
        numpyro.sample("z", dist.Normal(numpyro.param("loc", jnp.zeros(500)), 1.0).to_event(1))

    def size(num_particles, chunk_size=None):
        return temp_size(
            VIMCOStar(
                num_particles=num_particles, chunk_size=chunk_size, doubly_reparameterized=doubly_reparameterized
            ),
            model,
            guide,
        )

    # 64 bytes are room for the keys, log-weights and weights of one more particle; its latents would take 2,000.
    assert size(4096, 64) < size(128, 64) + 64 * 4096
    assert size(4096) > 10 * size(4096, 64)


MILLION = """
import sys
sys.path.insert(0, "benchmarks")
from common import digits, svi_of
from numpyro_vimco import VIMCOStar

x = digits()[:1]
svi, state = svi_of(VIMCOStar(num_particles=1_000_000, chunk_size=4000), data=(x,))
state, loss = svi.update(state, x)
# `ru_maxrss` would be that of the process that started this one, if it was larger.
kilobytes = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(float(loss), kilobytes)
"""


def run(*command, timeout=240):
    """The last line that a program prints, which is ended if it takes too long."""
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.weekly
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.long
def test_a_million_particles_in_two_gigabytes():
    loss, kilobytes = run(sys.executable, "-c", MILLION).split()
    assert 0 < float(loss) < 64 and int(kilobytes) < 2e6


@pytest.mark.long
def test_eight_devices_give_what_one_gives():
    assert run(sys.executable, "tests/devices.py") == "held"


@pytest.mark.weekly
@pytest.mark.long
def test_two_processes_give_what_one_gives():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "tests/devices.py", address, "2"]
    options = {"cwd": HERE.parent, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen([*command, index], **options) for index in "01"]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=240)
            assert process.returncode == 0 and output.splitlines()[-1] == "held", output
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.long
@pytest.mark.parametrize(
    "optimizer, key", [(numpyro.optim.Adam, random.PRNGKey), (optax.adam, random.key)], ids=["numpyro", "optax"]
)
def test_a_fit_that_stops_and_goes_on_is_the_uninterrupted_one(optimizer, key, tmp_path):
    def svi():
        return SVI(*global_latents(), optimizer(0.05), VIMCOStar(num_particles=4))

    whole = svi().run(key(0), 40, progress_bar=False)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", svi().run(key(0), 25, progress_bar=False).state)
    jax.clear_caches()
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        resumed = svi()
        state = checkpointer.restore(tmp_path / "state", resumed.init(key(1)))
    rest = resumed.run(key(1), 15, progress_bar=False, init_state=state)
    assert (rest.losses == whole.losses[25:]).all() and len(rest.losses) == 15
    for name, value in whole.params.items():
        np.testing.assert_array_equal(rest.params[name], value)
    assert (random.key_data(rest.state.rng_key) == random.key_data(whole.state.rng_key)).all()


@pytest.mark.parametrize("objective", [VIMCOStar, VIMCO, REINFORCE, ReweightedWakeSleep])
@pytest.mark.parametrize(
    "chunk_size, message",
    [
        (0, "is 0, but must be an integer of at least 1"),
        (-3, "is -3, but must be an integer of at least 1"),
        (5, "is 5, but must be a divisor of `num_particles`, which is 12: 4 or 6 would do"),
        (24, "is 24, but .* 12 would do"),
        (2.0, "is 2.0, but must be an integer"),
        ("all", "is 'all', but must be an integer"),
    ],
)
def test_chunk_size_that_does_not_divide_the_particles(objective, chunk_size, message):
    with pytest.raises(ValueError, match=f"`chunk_size` {message}"):
        objective(num_particles=12, chunk_size=chunk_size)


class Spread(NamedSharding):
    """Over 4 devices that are not there: only the arithmetic of shapes."""

    num_devices = 4

    def shard_shape(self, shape):
        return (shape[0] // 4,)


MESH = Mesh(np.array(jax.devices()[:1]), ("particles",))


@pytest.mark.parametrize("objective", [VIMCOStar, VIMCO, REINFORCE, ReweightedWakeSleep])
def test_sharding_that_does_not_divide_the_particles(objective):
    sharding = Spread(MESH, PartitionSpec("particles"))
    objective(num_particles=24, particle_sharding=sharding, chunk_size=12)
    with pytest.raises(ValueError, match="over 4 devices, but `num_particles` is 6: 4 or 8 would do"):
        objective(num_particles=6, particle_sharding=sharding)
    with pytest.raises(ValueError, match="over 4 devices, but `chunk_size` is 3: 4 would do"):
        objective(num_particles=24, particle_sharding=sharding, chunk_size=3)


def test_sharding_of_the_wrong_type():
    with pytest.raises(ValueError, match=r"`particle_sharding` is 'particles', but must be a `jax.sharding.Sharding`"):
        VIMCOStar(particle_sharding="particles")
    explicit = Mesh(MESH.devices, ("particles",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match=r"mesh with axes of type Explicit.*AxisType\.Auto"):
        VIMCOStar(particle_sharding=NamedSharding(explicit, PartitionSpec("particles")))


def test_one_device_is_a_sharding_too():
    programs = common_plate()
    whole = gradient(VIMCOStar(num_particles=4), programs)
    for sharding in (SingleDeviceSharding(jax.devices()[0]), NamedSharding(MESH, PartitionSpec("particles"))):
        jax.tree.map(
            np.testing.assert_array_equal,
            gradient(VIMCOStar(num_particles=4, particle_sharding=sharding), programs),
            whole,
        )
