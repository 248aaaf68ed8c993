"""Forty small posteriors with exact answers: `PROBLEMS`, by name. Their models and data are all in this folder."""

from benchmarks.small_posteriors import counts, modes, structures, switches

PROBLEMS = {problem.name: problem for module in (switches, counts, modes, structures) for problem in module.PROBLEMS}
