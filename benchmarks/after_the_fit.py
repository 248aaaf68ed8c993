"""Time and peak memory of what follows a fit, where each observation has a bound of its own.

    python benchmarks/after_the_fit.py

1. 60,000 binary images of 16 pixels with 4 binary latents each: diagnostics with the default 10,000 draws.
2. 50,000 values with one binary latent each: the same.
3. The 50,000 values: `to_arviz` without optional groups, 1,000 draws of 4,000 proposals.

Each in a process of its own, from the compilation on. Memory is the peak resident set of the process, with Python, JAX
and the fit; the peak until then stands beside it.
"""

import argparse
import os
import subprocess
import sys
import time

from common import print_machine
from jax import random
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI
import optax

from numpyro_vimco import Posterior, VIMCOStar


def images(x):
    """Binary pixels given four binary latents, for x of shape (n, 16)."""
    weights = numpyro.param("weights", 0.5 * random.normal(random.key(0), (4, 16)))
    with numpyro.plate("data", len(x)):
        h = numpyro.sample("h", dist.Bernoulli(0.5 * jnp.ones(4)).to_event(1))
        numpyro.sample("x", dist.Bernoulli(logits=h @ weights).to_event(1), obs=x)


def images_guide(x):
    """A linear recognition network."""
    weights = numpyro.param("q_weights", 0.1 * random.normal(random.key(1), (16, 4)))
    with numpyro.plate("data", len(x)):
        numpyro.sample("h", dist.Bernoulli(logits=x @ weights).to_event(1))


def values(x):
    """A mixture of two Normals."""
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        numpyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)


def values_guide(x):
    """A logistic regression."""
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("slope", 0.1) * x - numpyro.param("offset", 0.1)))


def _images(n):
    return images, images_guide, random.bernoulli(random.key(2), 0.5, (n, 16)).astype(jnp.float32)


def _values(n):
    return values, values_guide, random.normal(random.key(2), (n,)) + 2.0 * random.bernoulli(random.key(3), 0.4, (n,))


def diagnose(posterior):
    """Diagnostics with their default number of draws."""
    return posterior.diagnose(progress_bar=False).verdict


def convert(posterior):
    """The posterior for ArviZ."""
    return posterior.to_arviz(groups=(), progress_bar=False)["posterior"].attrs["ess"]


CASES = {
    "diagnostics of 60,000 images": (_images, 60_000, diagnose),
    "diagnostics of 50,000 values": (_values, 50_000, diagnose),
    "to_arviz of 50,000 values": (_values, 50_000, convert),
}


def peak():
    """Peak resident set of this process in MiB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def run(name, scale):
    """Fit, and then time what follows."""
    make, n, after = CASES[name]
    model, guide, x = make(int(n * scale))
    svi = SVI(model, guide, optax.adam(0.01), VIMCOStar(num_particles=8))
    result = svi.run(random.key(4), 200, x, progress_bar=False)
    before, start = peak(), time.perf_counter()
    after(Posterior(svi, result, x))
    seconds = time.perf_counter() - start
    print(f"{name:>32} {seconds:9.1f} {peak():9,.0f} {before:14,.0f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the observations")
    parser.add_argument("--case", choices=CASES, help="only this one, in this process")
    args = parser.parse_args()
    if args.case:
        run(args.case, args.scale)
        return
    print_machine()
    print(f"{'':>32} {'seconds':>9} {'MiB peak':>9} {'MiB after fit':>14}", flush=True)
    for name in CASES:
        command = [sys.executable, __file__, "--case", name, "--scale", str(args.scale)]
        subprocess.run(command, check=True, env={**os.environ})


if __name__ == "__main__":
    main()
