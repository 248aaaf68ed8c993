"""Tables and picture of docs/posteriors.md, from the CSV files of the results."""

from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.posteriors.grid import ALPHAS
from benchmarks.posteriors.results import RIGHT, read

PAGE = Path(__file__).parents[2] / "docs" / "posteriors.md"
PICTURE = PAGE.parent / "images" / "posteriors.png"
# `recommended` is the first that there is: what docs/which_objective.md says. Where all latents are global it says that
# sampling them is cheaper.
FORMS = ("recommended, local particles", "recommended, summed out", "recommended, all sampled")
ALL_GLOBAL = ("coal_mining",)
# Whom the tables and the picture compare; the other objectives have a table of their own.
COMPARED = (
    "recommended",
    "DiscreteHMCGibbs",
    "MixedHMC",
    "NUTS",
    "PyMC",
    "TraceEnum_ELBO, all time",
    "TraceGraph_ELBO, all time",
)
# A row may be so much later than its mark.
LATE = 1.03
# Limits of `refine` in seconds, and the R-hat from which chains are of no use.
LIMITS, BAD_R_HAT = (60, 120), 1.05
CLOCKS = ("seconds_with_compilation", "seconds")


class Runs:
    """The rows of one method on one problem.

    :param rows: of all seeds, as dicts of strings.
    """

    def __init__(self, rows):
        self.rows = rows
        self.notes = [row["note"] for row in rows if row["note"]]
        self.seeds = defaultdict(list)
        for row in rows:
            if row["error"]:
                self.seeds[row["seed"]].append(row)
        for seed in self.seeds.values():
            seed.sort(key=lambda row: float(row["seconds"]))

    def last(self, clock, budget):
        """Of each seed, its last row within the budget, or None."""
        within = [[row for row in rows if float(row[clock]) <= LATE * budget] for rows in self.seeds.values()]
        return [rows[-1] if rows else None for rows in within]

    def error(self, clock, budget):
        """The worst over seeds at the end of the budget, in posterior standard deviations; inf where there is none."""
        return max((float(row["error"]) if row else np.inf for row in self.last(clock, budget)), default=np.inf)

    def time_to_right(self, clock, budget):
        """The longest over seeds until the error is at most 0.1 and stays so; inf where it never is."""
        return max((self._time(rows, clock, budget) for rows in self.seeds.values()), default=np.inf)

    def _time(self, rows, clock, budget):
        time = np.inf
        for row in reversed([row for row in rows if float(row[clock]) <= LATE * budget]):
            if not float(row["error"]) <= RIGHT:
                break
            time = float(row[clock])
        return time

    def column(self, name, clock="seconds", budget=np.inf):
        """Numbers of the last rows of all seeds, where they are known."""
        return [float(row[name]) for row in self.last(clock, budget) if row and row[name] not in ("", "nan")]


def collect(folder):
    """By problem and method, its `Runs`; also of `recommended`, which is one of them."""
    found = {}
    for path in sorted(Path(folder).glob("*.csv")):
        by_method = defaultdict(list)
        for row in read(path):
            by_method[row["method"]].append(row)
        runs = {method: Runs(rows) for method, rows in by_method.items()}
        in_order = FORMS[::-1] if path.stem in ALL_GLOBAL else FORMS
        forms = [runs[name] for name in in_order if name in runs and runs[name].seeds]
        found[path.stem] = {**({"recommended": forms[0]} if forms else {}), **runs}
    return found


def table(header, rows):
    """Lines of a Markdown table."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows])


def number(x, digits=2):
    """As text; a dash for what is not there."""
    return "–" if x is None or not np.isfinite(x) else f"{x:.{digits}f}" if x < 100 else f"{x:,.0f}"


def problem_tables(results, budget):
    """For each problem, a row for each method."""
    header = ["", "error", "seconds to 0.1", "evidence", "ESS / s", "says", "right"]
    lines = []
    for problem, methods in results.items():
        rows = [problem_row(name, methods[name], budget) for name in (*FORMS, *COMPARED[1:]) if name in methods]
        lines += [f"### {problem}", "", table(header, rows), ""] if rows else []
    return "\n".join(lines).strip()


def problem_row(name, runs, budget):
    """The cells of one method on one problem."""
    if not runs.seeds:
        return [f"`{name}`", *["–"] * 4, runs.notes[0] if runs.notes else "", ""]
    last = [row for row in runs.last("seconds", budget) if row]
    right = {row["right"] for row in last if row["right"]}
    evidence = max(runs.column("evidence_error", budget=budget), key=abs, default=np.nan)
    return [
        f"`{name}`",
        " / ".join(number(runs.error(clock, budget), 3) for clock in CLOCKS),
        " / ".join(number(runs.time_to_right(clock, budget), 1) for clock in CLOCKS),
        number(evidence),
        number(np.median(runs.column("ess_per_second", budget=budget) or [np.nan]), 1),
        ", ".join(sorted({row["verdict"] for row in last if row["verdict"]})) or "nothing",
        "" if not right else "no" if "False" in right else "yes",
    ]


def verdicts(results, budget):
    """How often each method is within 0.1, and among the fastest; how often it says good in the end, and is wrong.

    The first two rows are the plan's, whatever the budget: on how many posteriors all seeds are within 0.1.
    """
    rows = []
    for name, label in (("planned", "`fit(model, …)`"), ("planned, improved", "… with `improve`, three minutes")):
        applies = [of[name] for of in results.values() if name in of and of[name].seeds]
        last = [rows[-1] for of in applies for rows in of.seeds.values()]
        within = sum(max(float(rows[-1]["error"]) for rows in of.seeds.values()) <= RIGHT for of in applies)
        good = [row for row in last if row["verdict"] == "good"]
        wrong = sum(row["right"] == "False" for row in good)
        counts = [f"{len(applies)} of {len(results)}", within, "–", f"{len(good)} of {len(last)}", wrong]
        rows.append([label, *counts])
    for name in COMPARED:
        applies = {problem: of[name] for problem, of in results.items() if name in of and of[name].seeds}
        if not applies:
            continue
        within = [sum(of.error(clock, budget) <= RIGHT for of in applies.values()) for clock in CLOCKS]
        fast = [sum(_is_fastest(results[p], of, clock, budget) for p, of in applies.items()) for clock in CLOCKS]
        last = [row for of in applies.values() for row in of.last("seconds", budget) if row]
        good = [row for row in last if row["verdict"] == "good"]
        wrong = sum(row["right"] == "False" for row in good)
        said = [f"{len(good)} of {len(last)}", wrong] if any(row["verdict"] for row in last) else ["–", "–"]
        counts = [" / ".join(map(str, of)) for of in (within, fast)]
        rows.append([f"`{name}`", f"{len(applies)} of {len(results)}", *counts, *said])
    return table(["", "applies", "within 0.1", "among the fastest", "runs called good", "of these wrong"], rows)


def _is_fastest(methods, runs, clock, budget, factor=1.5):
    best = min(methods[name].time_to_right(clock, budget) for name in COMPARED if name in methods)
    return bool(runs.time_to_right(clock, budget) <= factor * best < np.inf)


def plans(results, budget=180):
    """`fit(model, ...)` alone and with `improve`: the worst error of all seeds, verdicts, and seconds of the longest.

    The last row has how many are within 0.1, however long they took, and how many "good" are wrong; errors are
    neither. A star marks those that took longer than the budget.
    """
    names = ("planned", "planned, improved")
    rows, right, wrong, good = [], [0, 0], [0, 0], [0, 0]
    for problem, methods in results.items():
        if not all(name in methods and methods[name].seeds for name in names):
            if "improved" in methods:  # it ended in an error
                rows.append([problem, *["–", "an error", ""] * 2])
            continue
        cells = []
        for i, name in enumerate(names):
            runs = [rows[-1] for rows in methods[name].seeds.values()]
            error = max(float(row["error"]) for row in runs)
            right[i] += error <= RIGHT
            good[i] += sum(row["verdict"] == "good" for row in runs)
            wrong[i] += sum(row["right"] == "False" for row in runs)
            seconds = max(float(row["seconds_with_compilation"]) for row in runs)
            late = " *" if seconds > LATE * budget else ""
            cells += [number(error, 3), ", ".join(sorted({row["verdict"] for row in runs})), f"{seconds:.0f}{late}"]
        rows.append([problem, *cells])
    total = [x for i in (0, 1) for x in (f"{right[i]} of {len(rows)}", f"{wrong[i]} of {good[i]} good are wrong", "")]
    header = ["", "`fit(model)`: error", "says", "seconds", "with `improve`: error", "says", "seconds"]
    return table(header, [*rows, ["*within 0.1*", *total]])


def refined(results):
    """`fit(model, ...)` and `refine`: the worst of all seeds, and effective draws a second beside its parts alone.

    A part that fails by its own diagnostics has no number: weights whose verdict is "bad", an R-hat of 1.05 or more.
    """
    parts = {
        "refined": lambda row: True,
        "refined: weights alone": lambda row: "bad" not in row["note"],
        "refined: inner kernel alone": lambda row: float(row["rhat"]) < BAD_R_HAT,
    }
    rows, within, in_time, ahead, wrong = [], 0, [0] * len(LIMITS), 0, 0
    for problem, methods in results.items():
        if "refined" not in methods or not methods["refined"].seeds:
            continue
        runs = [seed[-1] for seed in methods["refined"].seeds.values()]
        error, seconds, rhat = (max(float(row[x]) for row in runs) for x in ("error", CLOCKS[0], "rhat"))
        speeds = [np.median([_ess_per_second(row, ok) for row in methods[name].rows]) for name, ok in parts.items()]
        within += error <= RIGHT
        in_time = [n + (error <= RIGHT and seconds <= LATE * limit) for n, limit in zip(in_time, LIMITS)]
        ahead += speeds[0] >= max(speeds[1:])
        wrong += sum(float(row["rhat"]) < 1.01 and float(row["error"]) > RIGHT for row in runs)
        verdicts = ", ".join(sorted({row["verdict"] for row in runs}))
        cells = [number(error, 3), verdicts, f"{rhat:.3f}", f"{seconds:.0f}"]
        rows.append([problem, *cells, *(number(x, 1) if x else "–" for x in speeds)])
    limits = ", ".join(f"{n} in {limit} s" for n, limit in zip(in_time, LIMITS))
    total = [f"{within} of {len(rows)}", "", f"{wrong} wrong below 1.01", limits, f"ahead on {ahead}", "", ""]
    header = ["", "error", "says", "R-hat", "seconds", "ESS / s", "weights alone", "inner kernel alone"]
    return table(header, [*rows, ["*within 0.1*", *total]])


def _ess_per_second(row, is_valid):
    """Effective draws a second, compilation counted; 0 where diagnostics say that there are none."""
    return float(row["relative_ess"]) * float(row["size"]) / float(row[CLOCKS[0]]) if is_valid(row) else 0.0


def wrong_goods(results):
    """Every row that says "good" and is not right."""
    header = ["problem", "method", "seed", "steps or draws", "seconds", "error", "of"]
    rows = [
        [problem, f"`{name}`", row["seed"], row["size"], number(float(row["seconds"]), 1), row["error"], row["worst"]]
        for problem, methods in results.items()
        for name, runs in methods.items()
        if name != "recommended"
        for seed in runs.seeds.values()
        for row in seed
        if row["right"] == "False"
    ]
    return table(header, rows) if rows else 'None: each "good" was right.'


def others_win(results, budget, clock="seconds_with_compilation"):
    """Problems on which another method is faster than 1.5 times the recommendation."""
    rows = []
    for problem, methods in results.items():
        times = {name: methods[name].time_to_right(clock, budget) for name in COMPARED if name in methods}
        ours = times.get("recommended", np.inf)
        best = min(times, key=times.get, default=None)
        if best and times[best] < np.inf and ours > 1.5 * times[best]:
            rows.append([problem, f"`{best}`", number(times[best], 1), number(ours, 1)])
    header = ["problem", "fastest", "seconds to 0.1", "recommended"]
    return table(header, rows) if rows else "None."


def star_against_vimco(results):
    """Relative ESS of single starts, median (and range), by α; and who is ahead by more than the range."""
    rows, ahead, higher = [], np.zeros((3, len(ALPHAS)), int), np.zeros((2, len(ALPHAS)), int)
    for problem, methods in results.items():
        cells = []
        for i, alpha in enumerate(ALPHAS):
            pair = [methods.get(f"{name}({alpha})") for name in ("VIMCOStar", "VIMCO")]
            star, vimco = (runs.column("relative_ess") if runs else [] for runs in pair)
            if not star or not vimco:
                cells.append("–")
                continue
            who = 0 if min(star) > max(vimco) else 2 if min(vimco) > max(star) else 1
            ahead[who, i] += 1
            difference = np.median(star) - np.median(vimco)
            higher[:, i] += difference > 0, difference < 0
            shown = [_range(star), _range(vimco)]
            cells.append(" / ".join(f"**{x}**" if who == side else x for side, x in zip((0, 2), shown)))
        if set(cells) != {"–"}:
            rows.append([problem, *cells])
    for name, counts in zip(("VIMCO-⋆ ahead", "within the range", "VIMCO ahead"), ahead):
        rows.append([f"*{name}*", *counts])
    rows.append(["*higher median*", *(f"{of_star} / {of_vimco}" for of_star, of_vimco in higher.T)])
    return table(["", *(f"α = {alpha:g}" for alpha in ALPHAS)], rows)


def _range(shares):
    low, middle, high = (f"{100 * x:.1f}" for x in (min(shares), np.median(shares), max(shares)))
    return f"{middle} ({low}–{high})"


def objectives(results):
    """Of all objectives with the same guide and 2,000 steps: over problems and starts."""
    names = [f"{name}({alpha})" for name in ("VIMCOStar", "VIMCO") for alpha in ALPHAS]
    rows = []
    for name in [*names, "ReweightedWakeSleep", "TraceGraph_ELBO"]:
        runs = {problem: methods[name] for problem, methods in results.items() if name in methods}
        runs = {problem: of for problem, of in runs.items() if of.seeds}
        if not runs:
            continue
        over = {column: [np.median(of.column(column) or [np.nan]) for of in runs.values()] for column in
                ("relative_ess", "pareto_k", "bound_gap", "error")}  # fmt: skip
        right = sum(of.error("seconds", np.inf) <= RIGHT for of in runs.values())
        rows.append([
            f"`{name}`", f"{100 * np.nanmedian(over['relative_ess']):.1f} %", number(np.nanmedian(over["pareto_k"])),
            number(np.nanmedian(over["bound_gap"])), number(np.nanmedian(over["error"]), 3), f"{right} of {len(runs)}",
        ])  # fmt: skip
    header = ["", "ESS", "k", "ELBO below the evidence (nats)", "error", "all starts within 0.1"]
    return table(header, rows)


def picture(results, budget, path, clock="seconds"):
    """Error against time of all seeds, one panel for each problem on which a method came to an end."""
    columns = 4
    some = lambda of: any(of[name].error(clock, budget) < np.inf for name in COMPARED if name in of)  # noqa: E731
    results = {problem: methods for problem, methods in results.items() if some(methods)}
    figure, axes = plt.subplots(
        -(-len(results) // columns), columns, figsize=(15, 3 * -(-len(results) // columns)), layout="constrained",
        sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    for ax, (problem, methods) in zip(axes.flat, results.items()):
        for i, name in enumerate(COMPARED):
            for seed in methods[name].seeds.values() if name in methods else ():
                times, errors = ([float(row[column]) for row in seed] for column in (clock, "error"))
                ax.loglog(times, errors, f"C{i}o-", ms=3, lw=1 if i else 2.5, alpha=0.8)
        ax.axhline(RIGHT, color="black", lw=0.8, ls=":")
        ax.set(title=problem, xlim=(0.5, 1.5 * budget), ylim=(1e-3, 30))
        ax.tick_params(labelbottom=True)  # also above a place that is empty
    for ax in axes.flat[len(results) :]:
        ax.axis("off")
    figure.supxlabel("seconds, compilation not counted")
    figure.supylabel("worst error (posterior standard deviations)")
    lines = [
        plt.Line2D([], [], color=f"C{i}", marker="o", ms=3, label=name)
        for i, name in enumerate(COMPARED)
        if any(name in methods for methods in results.values())
    ]
    figure.legend(handles=lines, loc="outside upper center", ncols=len(COMPARED))
    figure.savefig(path, dpi=90)
    plt.close(figure)


def write_report(folder, budget=60):
    """Fill the marked parts of the page, and draw the picture."""
    results = collect(folder)
    parts = {
        "plans": plans(results),
        "refined": refined(results),
        "verdicts": verdicts(results, budget),
        "wrong": wrong_goods(results),
        "others": others_win(results, budget),
        "star": star_against_vimco(results),
        "objectives": objectives(results),
        "problems": problem_tables(results, budget),
    }
    text = PAGE.read_text()
    for name, content in parts.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"
    PAGE.write_text(text)
    picture(results, budget, PICTURE)
    print(f"{len(results)} problems: {PAGE}, {PICTURE}")
