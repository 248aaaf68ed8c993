"""Memory and time of a step with many particles, evaluated all at once and a chunk at a time.

    python benchmarks/scale.py

Memory is XLA's temporary memory of the compiled step of `SVI.update`.

1. A sigmoid belief network (64 visible, 32 hidden units) on 128 digits: N = 4,096 in chunks of 256 against N = 256.
2. The same network on one digit, N = 2^4 … 2^20, in chunks of 4,096 at most and all at once.
"""

import argparse

from common import compile_step, digits, interleaved, median_ratio, print_machine, temp_size
import numpy as np

from numpyro_vimco import VIMCOStar

CHUNK = 4096


def compare_batch(rounds):
    """Print what chunks cost on a batch."""
    x = digits()[:128]
    steps = {
        "N = 256": compile_step(VIMCOStar(num_particles=256), data=(x,)),
        "N = 4,096, chunk_size = 256": compile_step(VIMCOStar(num_particles=4096, chunk_size=256), data=(x,)),
    }
    times = interleaved(steps, rounds)
    base, base_time = temp_size(steps["N = 256"][0]), times["N = 256"] / 256
    print(f"\n128 digits\n{'':>32} {'MB temp':>8} {'memory ratio':>13} {'µs / particle':>14} {'time ratio':>11}")
    for (name, (step, _)), particles in zip(steps.items(), (256, 4096)):
        time = times[name] / particles
        print(
            f"{name:>32} {temp_size(step) / 1e6:8.1f} {temp_size(step) / base:13.3f} "
            f"{1e6 * np.median(time):14.1f} {median_ratio(time, base_time):11.3f}"
        )


def grow(rounds):
    """Print memory and time as the number of particles grows."""
    x = digits()[:1]
    print(f"\n1 digit, chunk_size = {CHUNK:,} at most")
    print(f"{'':>8} {'in chunks:':>12} {'':>10} {'':>14} {'all at once:':>14}")
    print(f"{'N':>8} {'MB temp':>12} {'ms / step':>10} {'µs / particle':>14} {'MB temp':>14} {'ms / step':>10}")
    for exponent in range(4, 21, 2):
        particles = 2**exponent
        steps = {
            size: compile_step(VIMCOStar(num_particles=particles, chunk_size=size), data=(x,))
            for size in (min(particles, CHUNK), None)
        }
        times = interleaved(steps, rounds)
        chunked, whole = ((temp_size(step) / 1e6, 1e3 * np.median(times[size])) for size, (step, _) in steps.items())
        print(
            f"{particles:8} {chunked[0]:12.1f} {chunked[1]:10.2f} {1e3 * chunked[1] / particles:14.2f} "
            f"{whole[0]:14.1f} {whole[1]:10.2f}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    print_machine()
    compare_batch(rounds)
    grow(rounds)


if __name__ == "__main__":
    main()
