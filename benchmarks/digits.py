"""Bound reached against wall-clock time: a sigmoid belief network on the digits.

    python benchmarks/digits.py

Each objective fits the same network (64 visible, 32 hidden units) with 50 particles, batches of 128 of 1,500 digits and
Adam at 0.003. They take turns, 50 steps each, and each has a clock of its own, which runs in its turns only. When it
reaches a mark, the mean bound of the other 297 digits is estimated with 1,000 particles (α = 0), in nats per digit.
"""

import argparse
import time

from common import digits, print_machine, svi_of
import jax
from jax import random
from numpyro.infer import TraceGraph_ELBO

from numpyro_vimco import VIMCO, ReweightedWakeSleep, VIMCOStar

BATCH, PARTICLES, STEPS = 128, 50, 50
TRAIN, TEST = digits()[:1500], digits()[1500:]


class Fit:
    """A fit, the seconds that it has run, and the bounds that it has reached."""

    def __init__(self, objective):
        self.svi, self.state = svi_of(objective, data=(TRAIN[:BATCH],), learning_rate=3e-3)
        self.seconds, self.steps, self.bounds = 0.0, 0, []
        self.go_on = jax.jit(self._go_on).lower(self.state).compile()

    def _go_on(self, state):
        def step(state, _):
            rows = random.choice(random.fold_in(state.rng_key, 1), len(TRAIN), (BATCH,), replace=False)
            return self.svi.update(state, TRAIN[rows])

        return jax.lax.scan(step, state, None, length=STEPS)[0]

    def turn(self):
        """Go on, and look at the clock."""
        start = time.perf_counter()
        self.state = jax.block_until_ready(self.go_on(self.state))
        self.seconds += time.perf_counter() - start
        self.steps += STEPS


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--marks", type=float, nargs="+", default=[5, 10, 20, 40, 80], help="seconds")
    marks = parser.parse_args().marks
    print_machine()
    fits = {
        "VIMCOStar": Fit(VIMCOStar(num_particles=PARTICLES)),
        "VIMCO": Fit(VIMCO(num_particles=PARTICLES)),
        "ReweightedWakeSleep": Fit(ReweightedWakeSleep(PARTICLES)),
        "TraceGraph_ELBO": Fit(TraceGraph_ELBO(PARTICLES)),
    }
    svi = next(iter(fits.values())).svi
    tight = VIMCOStar(num_particles=1000, chunk_size=100)
    bound = jax.jit(lambda params: -tight.loss(random.key(1), params, svi.model, svi.guide, TEST) / len(TEST))
    print(f"\n{'bound after':>22}" + "".join(f"{mark:8g} s" for mark in marks) + f" {'steps':>9}")
    for mark in marks:
        while any(fit.seconds < mark for fit in fits.values()):
            for fit in fits.values():
                if fit.seconds < mark:
                    fit.turn()
        for fit in fits.values():
            fit.bounds.append(float(bound(fit.svi.get_params(fit.state))))
    for name, fit in fits.items():
        print(f"{name:>22}" + "".join(f"{value:10.2f}" for value in fit.bounds) + f" {fit.steps:9}")


if __name__ == "__main__":
    main()
