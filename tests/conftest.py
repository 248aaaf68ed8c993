"""Shared by all tests: shapes of the package's arrays are checked at run time, and warnings are errors."""

import gc
from importlib.metadata import version
import os
from pathlib import Path

# What XLA compiles is kept, for other processes and other runs: half of the time of all tests.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# XLA's older emitters of fused loops compile in half of the time; later versions have them no more.
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    quickly = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{quickly} {os.environ.get('XLA_FLAGS', '')}"

import jax
from jaxtyping import install_import_hook
import pytest

# Elsewhere, pytrees pass through JAX with other leaves than arrays, which a run-time check would refuse.
with install_import_hook("numpyro_vimco.objectives.control_variates", "beartype.beartype"):
    import numpyro_vimco  # noqa: F401


# Tests that take more than 2 s, compilation counted: `make slow` measures them, and writes the list. They are long.
SLOW = frozenset((Path(__file__).parent / "slow.txt").read_text().splitlines())


# Of these each case is a test by itself, and says whether it is weekly.
OF_ITS_OWN = ("test_docs.py",)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """A long test with several cases is run with one of them at each change, and weekly with the others."""
    for item in items:
        if item.nodeid in SLOW or item.get_closest_marker("weekly"):
            item.add_marker(pytest.mark.long)
    is_long = {item: item.get_closest_marker("long") is not None for item in items}
    run = {item.nodeid.partition("[")[0] for item in items if not is_long[item]}
    for item in items:
        name = item.nodeid.partition("[")[0]
        if is_long[item] and hasattr(item, "callspec") and item.path.name not in OF_ITS_OWN:
            if name in run:
                item.add_marker(pytest.mark.weekly)
            run.add(name)


AS_FOR_USERS = ("test_docs", "test_examples", "test_scale")


@pytest.fixture(autouse=True, scope="module")
def compile_quickly(request):
    """Most tests compile more than they compute. Not where fits are long, or memory is measured."""
    jax.config.update("jax_disable_most_optimizations", request.module.__name__ not in AS_FOR_USERS)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True, scope="module")
def collect_garbage_seldom():
    """JAX holds millions of objects that live on, and to look at them again and again is a third of the time."""
    gc.disable()
    yield
    gc.enable()
    gc.collect()


@pytest.fixture(scope="module")
def no_programs_of_others():
    """What other modules compiled is let go. In a long run JAX took their constants for those of double precision."""
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def x64(no_programs_of_others):
    """Run one test in double precision."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
