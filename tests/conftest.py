"""Shared by all tests: shapes of the package's arrays are checked at run time, and warnings are errors."""

import jax
from jaxtyping import install_import_hook
import pytest

# Elsewhere, pytrees pass through JAX with other leaves than arrays, which a run-time check would refuse.
with install_import_hook("numpyro_vimco.control_variates", "beartype.beartype"):
    import numpyro_vimco  # noqa: F401


@pytest.fixture
def x64():
    """Run one test in double precision."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
