# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""A posterior as it is printed, and as a notebook shows it."""

from collections.abc import Sequence
from html import escape
from textwrap import fill

import numpy as np

from numpyro_vimco.diagnostics.findings import Finding
from numpyro_vimco.diagnostics.verdict import Diagnostics

WIDTH = 88  # columns of what is printed: those of a notebook, and of the pages
# Bounds are shown where they are within this of the log evidence, in nats.
NEAR = 100


def rows(diagnostics: Diagnostics) -> dict[str, str]:
    """What is known, by name."""
    size, k = np.size(diagnostics.pareto_k), np.max(diagnostics.pareto_k)
    worst = f" (worst of {size} elements)" if np.ndim(diagnostics.pareto_k) else ""
    no_tail = " (no tail of weights that could do harm)" if np.isneginf(k) else ""
    evidence, std_error = diagnostics.log_evidence, diagnostics.log_evidence_std_error
    error = f"± {std_error:.3f}" if np.isfinite(std_error) else "or more, by an unknown number of"
    bounds = [f"{b:.3f}\xa0(N\xa0=\xa0{n})" for n, b in diagnostics.bounds.items() if n > 1 and evidence - b < NEAR]
    return {
        "verdict": diagnostics.verdict,
        "log evidence": f"{evidence:.3f} {error} nats",
        "bounds": ", ".join(bounds) or f"more than {NEAR} nats below",
        "ESS": f"{np.min(diagnostics.ess):,.1f} of {diagnostics.num_draws:,} draws{worst}",
        "Pareto k": f"{k:.2f}{worst}{no_tail}",
        "starts": _starts(diagnostics),
    }


def _starts(diagnostics: Diagnostics) -> str:
    """How far the starts are from each other."""
    agreement = diagnostics.agreement
    if agreement is None or agreement.sizes["start"] == 1:
        return "1"
    off = int(agreement["differs"].any("quantity").sum())
    apart = f"{off} off" if off else "which agree"
    each = ", ".join(
        f"{evidence:.3f}\xa0±\xa0{error:.3f}"
        for evidence, error in zip(agreement["log_evidence"].values, agreement["log_evidence_std_error"].values)
    )
    return f"{len(agreement['start'])}, {apart}; log evidence of each: {each} nats"


def as_text(rows: dict[str, str], findings: Sequence[Finding]) -> str:
    """Rows, then a paragraph for each finding."""
    lines = [fill(f"{name:14}{text}", WIDTH, subsequent_indent=" " * 14) for name, text in rows.items()]
    lines += [fill(f"- {finding}", WIDTH, subsequent_indent="  ", break_long_words=False) for finding in findings]
    return "\n".join(lines).replace("\xa0", " ")


def as_html(rows: dict[str, str], findings: Sequence[Finding]) -> str:
    """A table, then a list of findings, with remedies as code."""
    table = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows.items())
    items = "".join(
        f"<li>{escape(f.sentence)}{f' Try <code>{escape(f.remedy)}</code>.' if f.remedy else ''}</li>" for f in findings
    )
    return f"<table>{table}</table><ul>{items}</ul>"
