"""What a second fit of the same shapes takes, from `fit` to `to_arviz`, as its programs are compiled: coal mining.

    python benchmarks/second_call.py

Seconds of the process on all cores.
"""

from pathlib import Path
import sys
import time

from jax import random
import numpy as np
from numpyro.infer import SVI
import optax

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.posteriors import problem, recommended
from numpyro_vimco import AutoMixed, VIMCOStar, fit, importance_diagnostics, to_arviz

STEPS = 2000


def main():
    about = problem("coal_mining")
    for name, seed in (("first", 0), ("second", 1)):
        marks = [time.process_time()]
        svi = SVI(about.model, AutoMixed(about.model), optax.adam(recommended(STEPS)), VIMCOStar(0.5, num_particles=64))
        result = fit(svi, random.key(seed), STEPS, *about.args, progress_bar=False)
        marks.append(time.process_time())
        after = {"model_args": about.args, "progress_bar": False}
        importance_diagnostics(svi, result, rng_key=random.key(2), num_samples=40_000, **after)
        marks.append(time.process_time())
        to_arviz(svi, result, rng_key=random.key(3), num_samples=10_000, num_proposals=40_000, groups=(), **after)
        marks.append(time.process_time())
        fitting, diagnosing, drawing = np.diff(marks)
        parts = f"fit {fitting:5.1f} s, diagnostics {diagnosing:4.1f} s, to_arviz {drawing:4.1f} s"
        print(f"{name:6} {parts}, all {marks[-1] - marks[0]:5.1f} s")


if __name__ == "__main__":
    main()
