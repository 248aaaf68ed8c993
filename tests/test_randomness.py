"""Keys: one owner, no two consumers of one key, whatever JAX's generator."""

import ast
from collections import defaultdict
import os
from pathlib import Path
import subprocess
import sys

import jax
from jax import random
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.primitives import Messenger
import pytest

from helpers import of_two_lengths
import numpyro_vimco
from numpyro_vimco import VIMCOStar, randomness
from numpyro_vimco.randomness import SeedPlates, split, split_into

PACKAGE = Path(numpyro_vimco.__file__).parent


def test_no_other_module_derives_keys():
    for path in PACKAGE.rglob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
        used = {node.attr for node in nodes if ast.unparse(node.value) in ("random", "jax.random")}
        assert path.name == "randomness.py" or not used & {"split", "fold_in", "clone"}, path


class Collect(Messenger):
    """Notes the key of each message, whatever it is mapped over."""

    def __init__(self, fn, found):
        super().__init__(fn)
        self.found = found

    def postprocess_message(self, msg):
        key = msg["kwargs"].get("rng_key")
        if key is not None:
            data = random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
            jax.debug.callback(lambda data: self.found[msg["name"]].add(tuple(np.ravel(data).tolist())), data)


def program(sample):
    for name in "abc":
        sample(name)
    for plate in "pq":
        with numpyro.plate(plate, 3, subsample_size=2):
            sample(f"{plate}_first")
            sample(f"{plate}_second")


def model(x):
    program(lambda name: numpyro.sample(name, dist.Normal(0, 1)))


def guide(x):
    program(lambda name: numpyro.sample(name, dist.Normal(numpyro.param(f"{name}_loc", 0.1), 1.0)))


@pytest.fixture(params=[True, False], ids=["partitionable", "not partitionable"])
def generator(request):
    before = jax.config.jax_threefry_partitionable
    jax.config.update("jax_threefry_partitionable", request.param)
    yield
    jax.config.update("jax_threefry_partitionable", before)


@pytest.mark.parametrize(
    "make_key", of_two_lengths([random.key, random.PRNGKey], [random.key]), ids=["typed", "legacy"]
)
@pytest.mark.parametrize(
    "options", of_two_lengths([{}, {"chunk_size": 2}, {"doubly_reparameterized": False}], [{"chunk_size": 2}]), ids=str
)
def test_all_keys_of_a_step_are_distinct(generator, make_key, options):
    found = defaultdict(set)
    objective = VIMCOStar(1.0, 4, plate_particles={"p": 3, "q": 2}, **options)
    # With traced data the check of a plate's elements, which draws by itself, is left out.
    loss = jax.jit(lambda key, x: objective.loss(key, {}, Collect(model, found), Collect(guide, found), x))
    loss(make_key(0), 0.0).block_until_ready()
    jax.effects_barrier()
    # One key for each particle of a site; those of a plate's subsample are the same for all.
    numbers = dict.fromkeys("abc", 4) | {"p_first": 12, "p_second": 12, "q_first": 8, "q_second": 8, "p": 1, "q": 1}
    assert {name: len(keys) for name, keys in found.items()} == numbers
    assert len(set().union(*found.values())) == sum(numbers.values())


def independent(order):
    def sites(sample):
        for name in order:
            sample(name)
        with numpyro.plate("data", 1):
            return sample("z")

    def model():
        values = {}

        def sample(name):
            values[name] = numpyro.sample(name, dist.Normal(0, 1))

        sites(sample)
        with numpyro.plate("data", 1):
            numpyro.sample("x", dist.Normal(values["c"] + values["z"], 0.7), obs=jnp.array([2.0]))

    def guide():
        numpyro.param("unused", 0.0)
        sites(lambda name: numpyro.sample(name, dist.Normal(0, 1)))

    return model, guide


def losses(alpha, order):
    model, guide = independent(order)
    objective = VIMCOStar(alpha, 4, plate_particles={"data": 2})
    loss = jax.jit(jax.vmap(lambda key: objective.loss(key, {}, model, guide)))
    return np.asarray(loss(random.split(random.key(0), 20_000)), float)


def test_local_particles_are_independent_of_global_sites():
    """exp(-loss) has the evidence as its mean: 20,000 draws, 5 standard errors; shared keys are off by 0.027 nats."""
    ratio = np.exp(-losses(0.0, "abc") - dist.Normal(0, 2.49**0.5).log_prob(2.0))
    error = ratio.std() / 20_000**0.5
    assert abs(ratio.mean() - 1) < 5 * error
    assert 5 * error < 0.025


def test_order_of_independent_sites_does_not_matter():
    """20,000 draws each, 5 standard errors of the difference; shared keys differ by 0.45."""
    first, second = losses(1.0, "abc"), losses(1.0, "cab")
    error = ((first.var() + second.var()) / 20_000) ** 0.5
    assert abs(first.mean() - second.mean()) < 5 * error < 0.2


def test_plates_have_one_subsample_by_name_and_none_shares_another_s():
    def plates(*names):
        return [np.asarray(numpyro.plate(name, 50, subsample_size=5)._indices) for name in names]

    met = []
    guide = dict(zip("ab", SeedPlates(plates, random.key(0), met)("a", "b")))
    model = dict(zip("bca", SeedPlates(plates, random.key(0), met)("b", "c", "a")))
    for name in "ab":
        np.testing.assert_array_equal(guide[name], model[name])
    assert len({tuple(indices) for indices in model.values()}) == 3


@pytest.mark.parametrize("number", [1, 3, 8, 9])
def test_keys_one_by_one_are_those_of_an_array(number, generator):
    inside = jax.jit(lambda key: jnp.stack(split_into(key, number)))(random.key(3))
    expected = random.key_data(random.split(random.key(3), number))
    for keys in (inside, jnp.stack(split_into(random.key(3), number)), split(random.key(3), number)):
        np.testing.assert_array_equal(random.key_data(keys), expected)


def test_generators_of_numpy_follow_the_key():
    for make in (random.key, random.PRNGKey):
        first, again, other = (randomness.generator(make(seed)).random() for seed in (0, 0, 1))
        assert first == again != other


OF_ANY_PROCESS = """
import jax, numpyro, optax
import numpyro.distributions as dist
from numpyro.infer import SVI
from numpyro_vimco import AutoMixed, VIMCOStar, fit

def model():
    a = numpyro.sample("a", dist.Bernoulli(0.3))
    beta = numpyro.sample("beta", dist.Normal(a, 1.0))
    count = numpyro.sample("count", dist.Poisson(3.0))
    delta = numpyro.sample("delta", dist.Normal(0, 1))
    numpyro.sample("x", dist.Normal(beta + count + delta, 1.0), obs=2.0)

svi = SVI(model, AutoMixed(model), optax.adam(0.01), VIMCOStar(0.5, 4))
posterior = fit(svi, jax.random.key(0), 3, num_starts=2, progress_bar=False)
draws = posterior.to_arviz(groups=(), progress_bar=False)["posterior"]
print([float(posterior.log_evidence), *(float(draws[name].mean()) for name in ("beta", "count", "delta"))])
"""


@pytest.mark.long
def test_another_process_has_the_same_draws():
    """Sets of names have another order in each process."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    runs = [
        subprocess.run(
            [sys.executable, "-c", OF_ANY_PROCESS],
            env={**environment, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in range(3)
    ]
    assert runs[0].startswith("[") and runs[0] == runs[1] == runs[2]
