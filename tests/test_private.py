"""What the package uses of NumPyro, JAX and funsor beyond their public interfaces is there, and in one module each."""

from functools import reduce
import importlib
from pathlib import Path
import re

from jax import random
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import seed
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
import pytest

import numpyro_vimco
from numpyro_vimco.private import of_funsor, of_jax, of_numpyro

PACKAGE = Path(numpyro_vimco.__file__).parent
PRIVATE = re.compile(
    r"(?<!self)(?<!cls)(?<!super\(\))(?<!posterior)(?<!result)\._(?!replace|asdict|approx|of\b)[a-z]\w*"
    r"|from (numpyro|jax|funsor)[\w.]* import .*\b_[A-Za-z]"
    r"|jax\._src|jax\.interpreters|numpyro\.contrib\.funsor\.infer_util import"
)


def missing(parts):
    """Those that are not there."""
    found = []
    for part in parts:
        names = part.split(".")
        for i in range(len(names), 0, -1):
            try:
                module = importlib.import_module(".".join(names[:i]))
            except ImportError:
                continue
            try:
                reduce(getattr, names[i:], module)
            except AttributeError:
                found.append(part)
            break
        else:
            found.append(part)
    return found


@pytest.mark.parametrize("module", [of_numpyro, of_jax, of_funsor])
def test_parts_are_there(module, monkeypatch):
    pytest.importorskip("funsor")
    assert not missing(module.PARTS)
    for part in module.PARTS:  # and the test sees it if one is not
        holder, name = part.rsplit(".", 1)
        assert missing([f"{holder}.{name}_"]) == [f"{holder}.{name}_"]


def model():
    numpyro.sample("a", dist.Normal(0, 1))


def test_attributes_of_guides_are_there():
    for make, attributes in (
        (AutoNormal, of_numpyro.OF_AUTO_NORMAL),
        (AutoMultivariateNormal, of_numpyro.OF_JOINT_GUIDE),
    ):
        guide = make(model)
        seed(guide, random.key(0))()
        assert [name for name in attributes if not hasattr(guide, name)] == []


def test_names_of_enumeration_are_there():
    pytest.importorskip("funsor")
    from numpyro.contrib.control_flow import scan
    from numpyro.contrib.funsor import enum
    from numpyro.contrib.funsor import trace as enumerated

    def step(z, _):
        return numpyro.sample("z", dist.Bernoulli(0.2 + 0.5 * z), infer={"enumerate": "parallel"}), None

    sites = enumerated(enum(seed(lambda: scan(step, 0, None, length=4), random.key(0)), -1)).get_trace()
    assert {"_PREV_z", "z"} <= set(sites)
    names = of_funsor.names_of_dims(sites["z"]).values()
    assert "z" in names and any(name.startswith("_time_") for name in names)


def test_masks_are_there():
    assert of_numpyro.own_mask(dist.Normal(0, 1).mask(False)) is False


def test_no_other_module_uses_private_parts():
    found = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        if path.parent.name != "private"
        for line in path.read_text().splitlines()
        if PRIVATE.search(line) and not line.strip().startswith("#")
    ]
    assert not found, "\n".join(found)
