"""The README's tables and the plot of sampling, from results/sampling.json.

python benchmarks/sampling_table.py
"""

import argparse
import json
import statistics
from typing import Any

from measure import RESULTS, write_table

PLOT = RESULTS.parent.parent / "docs" / "sampling.png"


def cell(figures: dict[str, Any]) -> str:
    """Score and distance of one setting."""
    return f"{100 * figures['score']['all']:.1f} % / {1000 * figures['frechet']:.1f}"


def difference(first: dict[str, Any], second: dict[str, Any]) -> str:
    """Points by which the first setting scores higher, with the standard error of that, over the same scenes."""
    values = [100 * (int(a) - int(b)) for a, b in zip(first["right"], second["right"], strict=True)]
    return f"{statistics.mean(values):+.1f} ± {statistics.stdev(values) / len(values) ** 0.5:.1f} points"


def sampler_table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Samplers by steps."""
    steps = list(next(iter(found.values())))
    lines = ["| sampler | " + " | ".join(f"{step} steps" for step in steps) + " | 10 against 50 steps |"]
    lines.append("| --- |" + " ---: |" * (len(steps) + 1))
    for name, row in found.items():
        cells = [cell(row[step]) for step in steps]
        lines.append(f"| {name} | {' | '.join(cells)} | {difference(row['10'], row['50'])} |")
    return lines


def setting_table(title: str, found: dict[str, dict[str, Any]], base: str) -> list[str]:
    """One row a setting, against a base setting."""
    lines = [f"| {title} | right / Frechet | against {base} |", "| --- | ---: | ---: |"]
    return lines + [f"| {name} | {cell(row)} | {difference(row, found[base])} |" for name, row in found.items()]


def student_table(found: dict[str, dict[str, Any]]) -> list[str]:
    """The student, and its teacher in as many steps, against the teacher in 50."""
    rows = {f"teacher, {name.replace(',', ' steps,')}": row for name, row in found["teacher"].items()}
    rows |= {f"student, {name} steps": row for name, row in found["student"].items()}
    best = next(name for name in rows if name.startswith("teacher, 50") and "guidance 1" not in name)
    return setting_table("student", rows, best)


def cache_table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Thresholds: quality and speed."""
    lines = ["| cache threshold | right / Frechet | times as fast |", "| --- | ---: | ---: |"]
    for name, row in found.items():
        speed = row["speed"]
        lines.append(f"| {name} | {cell(row)} | {speed['median']:.2f} ({speed['low']:.2f} to {speed['high']:.2f}) |")
    return lines


def plot(figures: dict[str, Any]) -> None:
    """Score and distance against the number of steps."""
    import matplotlib.pyplot as plt  # not where only figures are made

    lines = dict(figures["samplers"])
    if "student" in figures:
        teacher = figures["student"]["teacher"]
        lines["student"] = figures["student"]["student"]
        lines["teacher, no guidance"] = {
            name.split(",")[0]: row for name, row in teacher.items() if name.endswith("guidance 1")
        }
    picture, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, row in lines.items():
        steps = [int(step) for step in row]
        style = {"linewidth": 2.5, "marker": "o"} if name == "student" else {"marker": "."}
        left.plot(steps, [100 * value["score"]["all"] for value in row.values()], label=name, **style)
        right.plot(steps, [value["frechet"] for value in row.values()], label=name, **style)
    right.axhline(figures["frechet_of_rendered"], color="gray", linestyle=":", label="rendered scenes")
    for axis, title in ((left, "% right in all attributes"), (right, "Frechet distance, random features")):
        axis.set(xscale="log", xlabel="steps", title=title, xticks=[1, 2, 4, 10, 20, 50])
        axis.set_xticklabels(["1", "2", "4", "10", "20", "50"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    right.set_ylim(bottom=0)
    left.legend(fontsize="small")
    picture.savefig(PLOT, dpi=110)


def main() -> None:
    """Write the tables and the plot."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    figures = json.loads((RESULTS / "sampling.json").read_text())
    parts = [sampler_table(figures["samplers"]), setting_table("guidance", figures["guidance"], "none")]
    if "student" in figures:
        parts.append(student_table(figures["student"]))
    if "classifier" in figures:
        parts.append(setting_table("classifier's scale", figures["classifier"], "0.0"))
    parts.append(cache_table(figures["cache"]))
    lines = [line for part in parts for line in (*part, "")]
    packed = "; ".join(
        f"{name} {row['median']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        for name, row in figures["packed_guidance"].items()
    )
    lines += [f"Guidance in one packed pass is so many times as fast as in two: {packed}.", ""]
    rendered = figures["frechet_of_rendered"]
    lines += [
        f"Each cell: share of {figures['scenes']} held-out scenes right in all attributes / 1,000 times the Frechet",
        f"distance to rendered ones (two sets of those: {1000 * rendered:.1f}). Differences are over the same scenes",
        "and seeds, with their standard error; DDIM without fresh noise is Euler on a flow. Of one run of `make demo`",
        "(92.5 %), and of the student, the classifier and the model without captions (1,600 steps) that came after it.",
        f"Measured on {figures['date']}: {figures['machine']}.",
    ]
    write_table("sampling table", "\n".join(lines))
    plot(figures)


if __name__ == "__main__":
    main()
