"""What all methods are measured by: a clock that tells compilation apart, and the quantities that are asked."""

from time import perf_counter, process_time

import jax
import jax.numpy as jnp
import numpy as np

# When JAX traced, lowered or compiled: (begin, end), by `perf_counter`.
COMPILING: list[tuple[float, float]] = []
# Times at which both were read: by `perf_counter`, and of the process's processors by `process_time`.
READ: list[tuple[float, float]] = []


def read_clocks():
    """Seconds of the processors that this process has used."""
    READ.append((perf_counter(), process_time()))
    return READ[-1][1]


def _note(event, seconds, **_):
    if event.startswith("/jax/core/compile/"):
        read_clocks()
        end = READ[-1][0]
        COMPILING.append((end - seconds, end))


jax.monitoring.register_event_duration_secs_listener(_note)


def compiling_between(begin, end):
    """Seconds of the processors in which JAX was tracing, lowering or compiling; what is nested counts once.

    :param begin: by `perf_counter`, as ``end``.
    """
    covered, reached = [], begin
    for start, stop in sorted(pair for pair in COMPILING if pair[1] > begin):
        start, stop = max(start, reached), min(stop, end)
        if stop > start:
            covered, reached = [*covered, (start, stop)], stop
    of_processors = np.interp(covered, *np.array(READ).T) if covered else np.zeros((0, 2))
    return float((of_processors[:, 1] - of_processors[:, 0]).sum())


def forget_compiled():
    """So that a run compiles as in a process of its own, whatever has run before."""
    jax.clear_caches()


class Clock:
    """Time of the parts of a method that are run inside of ``with clock:``, in seconds of the processors.

    On a processor of its own, these are the seconds that pass; on one that is shared, they do not count others' work.
    JAX reports each tracing, lowering and compilation with its duration, so that one run shows both its time as a whole
    and without them. Other work of Python before and after is counted in both.

    :ivar total: seconds.
    :ivar compiling: seconds of these in which JAX traced, lowered or compiled.
    """

    def __init__(self):
        self.total = self.compiling = 0.0

    def __enter__(self):
        self._read = read_clocks()
        self._began = READ[-1][0]
        return self

    def __exit__(self, *_):
        self.total += read_clocks() - self._read
        self.compiling += compiling_between(self._began, READ[-1][0])

    @property
    def seconds(self):
        """Without compilation."""
        return self.total - self.compiling

    def columns(self):
        """Both times, as columns of a row."""
        return {"seconds_with_compilation": self.total, "seconds": self.seconds}


class Quantities:
    """What is asked of a posterior, as one vector.

    :ivar names: of its elements.
    :ivar known: whether an element has a posterior standard deviation above 0: the others are not compared.
    """

    def __init__(self, about):
        self.about, truth = about, about.truth
        flat = lambda arrays: np.concatenate([np.ravel(arrays[name]) for name in truth.means])  # noqa: E731
        self.mean, self.sd = flat(truth.means), flat(truth.sds)
        self.known = self.sd > 0
        self.names = [
            name + "".join(f"[{i}]" for i in index) for name, x in truth.means.items() for index in np.ndindex(x.shape)
        ]

    def of(self, draw):
        """Of one draw of all latents, of shape ``(quantities,)``; can be traced."""
        found = self.about.asked(draw, *self.about.args)
        return jnp.concatenate([jnp.ravel(jnp.asarray(found[name], float)) for name in self.about.truth.means])

    def error(self, estimate):
        """The worst error of an estimate in posterior standard deviations, and where it is, as columns of a row."""
        errors = np.where(self.known, np.abs(estimate - self.mean) / np.where(self.known, self.sd, 1), -1.0)
        errors = np.where(np.isnan(errors), np.inf, errors)
        return {"error": float(errors.max()), "worst": self.names[int(errors.argmax())]}

    def of_evidence(self, estimate, elbo=None):
        """The error of an estimate of the log evidence, and how far the ELBO is below it, as columns of a row.

        The ELBO is held against the estimate where the truth is not known.
        """
        known = self.about.truth.log_evidence
        row = {} if known is None else {"evidence_error": float(estimate - known)}
        return row if elbo is None else {**row, "bound_gap": float((estimate if known is None else known) - elbo)}


def mean_asked(quantities, draws):
    """Means of what is asked over draws of equal weight.

    :param draws: by site, arrays with a leading axis for the draws.
    """
    return Mapped(quantities.of, 1000)(draws).astype(float).mean(0)


class Mapped:
    """A function of one draw over many, compiled once for so many at a time.

    :param fn: from arrays of one draw to arrays.
    """

    def __init__(self, fn, size):
        self._fn, self._size = jax.jit(jax.vmap(fn)), size

    def __call__(self, *inputs):
        """Of inputs with a leading axis for the draws, NumPy arrays with one."""
        length = len(jax.tree.leaves(inputs)[0])
        parts = []
        for begin in range(0, length, self._size):
            # The last chunk is filled with repetitions, which are dropped.
            index = np.minimum(np.arange(begin, begin + self._size), length - 1)
            parts.append(self._fn(*jax.tree.map(lambda x, index=index: x[index], inputs)))
        return jax.tree.map(lambda *xs: np.concatenate([np.asarray(x) for x in xs])[:length], *parts)
