# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Whether chains that a fit guides are done, and what they have in common with the weighted draws."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpyro.infer import MCMC

from numpyro_vimco.diagnostics.findings import Finding
from numpyro_vimco.draws.moments import Estimate
from numpyro_vimco.posterior.tables import as_text
from numpyro_vimco.sites import element_names

# Vehtari et al. 2021: chains are not done from this R-hat on, or below this ESS for four chains.
R_HAT, ESS = 1.01, 400
# From this R-hat on, or below this ESS, draws are of no use: they do not even tell their own error.
BAD_R_HAT, BAD_ESS = 1.05, 100
# Global steps that move less often than this do not connect regions.
MOVED = 0.01
# Means differ by more than so many posterior standard deviations, and so many standard errors.
DIFFERENCE, ERRORS = 0.1, 4


@dataclass(frozen=True)
class ChainDiagnostics:
    """How well chains of :class:`.GuidedMCMC` stand for the posterior.

    :ivar verdict: "good", if the largest R-hat is below 1.01 and both ESS are 400 or more [1], no step diverged, a
        hundredth of the global steps move, and the means are those of the weighted draws, where these are "good" or
        "usable"; "bad", if an R-hat is 1.05 or more, or an ESS below 100; else "usable". It knows nothing of a part of
        the posterior that no start and no defended draw comes near, and no chain visited.
    :ivar findings: what to make of it, or what to do, the gravest first.
    :ivar r_hat: rank-normalized split R-hat, of each latent, of its shape; infinite where chains stay at different
        values.
    :ivar ess_bulk: effective sample size of the bulk, likewise.
    :ivar ess_tail: of the 5% and the 95% quantile, likewise.
    :ivar moved: share of the global steps that moved; of those of single elements, on average.
    :ivar diverging: number of steps of an inner HMC that diverged.
    :ivar difference: of the means from those of the weighted draws, in posterior standard deviations, of each latent.
    :ivar difference_std_error: its standard error.

    1. *Rank-normalization, folding, and localization: an improved R-hat*, Vehtari, Gelman, Simpson, Carpenter and
       Bürkner 2021, by ArviZ
    """

    verdict: str
    findings: list[Finding]
    r_hat: dict[str, np.ndarray]
    ess_bulk: dict[str, np.ndarray]
    ess_tail: dict[str, np.ndarray]
    moved: float
    diverging: int
    difference: dict[str, np.ndarray]
    difference_std_error: dict[str, np.ndarray]

    def rows(self) -> dict[str, str]:
        """What is printed, by name."""
        return {
            "verdict": self.verdict,
            "R-hat": f"{_worst(self.r_hat)[1]:.3f} ('{_worst(self.r_hat)[0]}')",
            "ESS": f"{_least(self.ess_bulk)[1]:,.0f} (bulk), {_least(self.ess_tail)[1]:,.0f} (tail)",
            "global moves": f"{self.moved:.1%}",
            "diverging": f"{self.diverging:,}",
        }

    def attributes(self) -> dict[str, Any]:
        """What an exported posterior keeps of it: numbers of the worst element."""
        return {
            "verdict": self.verdict,
            "r_hat": _worst(self.r_hat)[1],
            "ess_bulk": _least(self.ess_bulk)[1],
            "ess_tail": _least(self.ess_tail)[1],
            "moved": self.moved,
        }

    def __str__(self) -> str:
        return as_text(self.rows(), self.findings)


def diagnose_chains(
    latents: Mapping[str, Any], estimates: Mapping[str, Estimate], mcmc: MCMC, known: bool
) -> ChainDiagnostics:
    """What R-hat, ESS, global moves and the weighted draws say of chains.

    :param latents: names of the latents.
    :param estimates: of the weighted draws.
    :param known: whether their verdict is better than "bad".
    """
    samples = mcmc.get_samples(group_by_chain=True)
    draws = {name: np.asarray(samples[name]).astype(float) for name in latents}
    r_hat, ess_bulk, ess_tail = (_statistic(draws, name) for name in ("rhat", "bulk", "tail"))
    extra = mcmc.get_extra_fields()
    moved, diverging = float(np.mean(extra["moved"])), int(np.sum(extra.get("diverging", 0)))
    difference, error = {}, {}
    for name, values in draws.items():
        about = estimates[name]
        flat = values.reshape(-1, *values.shape[2:])
        unit = np.maximum(about.std, flat.std(0))
        with np.errstate(divide="ignore", invalid="ignore"):
            difference[name] = np.nan_to_num((flat.mean(0) - about.mean) / unit)
            of_chains = flat.std(0) ** 2 / ess_bulk[name]
            error[name] = np.nan_to_num(np.sqrt(about.std_error**2 + of_chains) / unit)
    found = ChainDiagnostics("", [], r_hat, ess_bulk, ess_tail, moved, diverging, difference, error)
    verdict, findings = _judged(found, known)
    return replace(found, verdict=verdict, findings=findings)


def _judged(found: ChainDiagnostics, known: bool) -> tuple[str, list[Finding]]:
    """The verdict, and what to make of it."""
    where, r_hat = _worst(found.r_hat)
    least_of, ess = min(_least(found.ess_bulk), _least(found.ess_tail), key=lambda named: named[1])
    far = {
        name: np.where(size > np.maximum(DIFFERENCE, ERRORS * found.difference_std_error[name]), size, 0)
        for name, size in ((name, np.abs(value)) for name, value in found.difference.items())
    }
    other, by = _worst(far)
    more = "posterior.refine(random.key(2), num_samples=4000)"
    said: list[tuple[bool, Finding]] = [
        (
            r_hat >= R_HAT,
            Finding(
                "chains-disagree",
                f"The chains have not mixed: R-hat of '{where}' is {r_hat:.3f}, where less than {R_HAT} is asked for. "
                "Regions that they do not leave count as often as chains began there.",
                {"r_hat": r_hat},
                more,
            ),
        ),
        (
            ess < ESS,
            Finding(
                "few-effective-draws",
                f"The draws of '{least_of}' are worth {ess:,.0f} independent ones, less than {ESS}.",
                {"ess": ess},
                more,
            ),
        ),
        (
            found.moved < MOVED,
            Finding(
                "no-global-moves",
                f"Of the global steps {found.moved:.1%} moved, so that the chains are those of the inner kernel alone. "
                "A mode that it cannot reach from where they began is not in them.",
                {"moved": found.moved},
            ),
        ),
        (
            found.diverging > 0,
            Finding(
                "divergences",
                f"{found.diverging:,} steps of HMC diverged: it does not follow the posterior there.",
                {"diverging": found.diverging},
            ),
        ),
        (
            by > 0 and known,
            Finding(
                "weights-differ",
                f"The chains have another mean of '{other}' than the weighted draws, by {by:.2f} posterior standard "
                "deviations. One of the two is wrong, and neither knows which.",
                {"difference": by},
            ),
        ),
    ]
    findings = [finding for is_so, finding in said if is_so]
    verdict = "bad" if r_hat >= BAD_R_HAT or ess < BAD_ESS else "usable" if findings else "good"
    if by and not known:
        findings.append(
            Finding(
                "weights-corrected",
                f"The mean of '{other}' is {by:.2f} posterior standard deviations from that of the weighted draws, "
                'whose verdict is "bad".',
                {"difference": by},
            )
        )
    return verdict, findings


def _statistic(draws: Mapping[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """One of ArviZ's statistics of each latent, of its shape."""
    import arviz as az

    found = {}
    for name, values in draws.items():
        flat = values.reshape(*values.shape[:2], -1)
        dataset = az.convert_to_dataset({"x": flat})
        with np.errstate(all="ignore"):  # where chains do not move
            of_all = az.rhat(dataset) if kind == "rhat" else az.ess(dataset, method=kind)
        statistic = np.asarray(of_all["x"].values, float).reshape(-1)
        if kind == "rhat":
            stays = flat.std(1).max(0) == 0
            same = flat.reshape(-1, flat.shape[-1]).std(0) == 0
            statistic = np.where(stays, np.where(same, 1.0, np.inf), np.nan_to_num(statistic, nan=np.inf))
        found[name] = statistic.reshape(values.shape[2:])
    return found


def _worst(of_latents: Mapping[str, np.ndarray]) -> tuple[str, float]:
    """The name of the element with the largest value, and this."""
    name = max(of_latents, key=lambda n: np.max(of_latents[n], initial=-np.inf))
    value = of_latents[name]
    return element_names(name, value.shape)[int(np.argmax(value))], float(np.max(value))


def _least(of_latents: Mapping[str, np.ndarray]) -> tuple[str, float]:
    name, value = _worst({name: -value for name, value in of_latents.items()})
    return name, -value
