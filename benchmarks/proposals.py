"""Proposals of chains that a fit guides: made before the run, or in each step; compilation counted.

    taskset -c 0 python benchmarks/proposals.py [--problem hares] [--steps 200]

The fit is short, as its quality has no part in this. Seconds of the processors of `refine` with its default settings.
"""

import argparse
from pathlib import Path
import sys
from unittest import mock

from jax import random
from numpyro.infer import SVI
import optax

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.posteriors import PROBLEMS, problem, recommended
from benchmarks.posteriors.measuring import Clock, forget_compiled
from numpyro_vimco import AutoMixed, VIMCOStar, fit
from numpyro_vimco.mcmc import kernel


def main(args):
    about = problem(args.problem)
    model = about.model if about.enumerated is None else about.enumerated
    guide = AutoMixed(model, **about.guide_options)
    svi = SVI(model, guide, optax.adam(recommended(args.steps)), VIMCOStar(0.5, 64))
    print(f"{args.problem}\nproposals      compiling    steps")
    for way, most in (("before the run", kernel.MOST), ("in the step", 0)):
        forget_compiled()
        posterior = fit(svi, random.key(0), args.steps, *about.args, progress_bar=False)
        posterior.diagnose(1000)  # whose program makes the proposals
        clock = Clock()
        with clock, mock.patch.object(kernel, "MOST", most):
            posterior.refine(random.key(1), progress_bar=False)
        print(f"{way:14} {clock.compiling:8.1f} s {clock.seconds:6.1f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", default="hares", choices=PROBLEMS, metavar="NAME")
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args())
