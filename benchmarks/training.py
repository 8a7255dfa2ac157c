"""What training costs beside the step itself: Ray Train, checkpoints, padding, kills.

    python benchmarks/training.py --run runs/train_video/<run of make demo>
        [--parts loop packing checkpoints workers goodput] [--minutes 15 --kill-every 60]

A run's transformer, on its LATENTS, on a CPU.
loop: seconds a step through Ray Train against a bare loop of the same step under torchrun, both with prefetching, in
turns; with start-up stated beside it.
packing: tokens a second of packed steps against random batches padded to their largest clip, and against batches of
clips that are alike, with the padding masked as keys and without (which trains on padding), in turns.
checkpoints: the share of a run that stood still for checkpoints, and that a run with them takes longer.
workers: tokens a second of 1, 2 and 4 workers (of as many cores as there are).
goodput: SIGKILL of a worker every so many seconds; the share of the time that went into steps that counted, and where
the rest went.
Writes results/training.json and the README's table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

from measure import RESULTS, Ratio, ratio, write_result, write_table
from training_faults import goodput
from training_loop import bare_loop, loop
from training_packing import packing
from training_runs import NEVER, NUM_STEPS, WARM_UP, Bench, rows_of, task_of


def main() -> None:
    """Measure the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="folder of a finished run of train_video")
    parser.add_argument("--parts", nargs="+", default=["loop", "packing", "checkpoints", "workers"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=15, help="of goodput")
    parser.add_argument("--kill-every", type=float, default=60, help="seconds, of goodput")
    parser.add_argument("--bare", nargs=2, metavar=("RUN", "FILE"), help="only the bare loop, under torchrun")
    options = parser.parse_args()
    if options.bare:
        run, file = options.bare
        bare_loop(task_of(run), file)
        return
    if not options.run:
        parser.error("--run: give the folder of a finished run")
    from pipeline import cluster

    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["OMP_NUM_THREADS"] = "1"
    cluster.connect(num_cpus=4, address="local", include_dashboard=False)
    file = RESULTS / "training.json"
    figures: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.run, folder)
        parts: dict[str, Callable[[], Any]] = {
            "loop": lambda: loop(bench, options.rounds),
            "packing": lambda: packing(bench),
            "checkpoints": lambda: checkpoints(bench, options.rounds),
            "workers": lambda: workers(bench),
        }
        for name in options.parts:
            if name == "goodput":
                found = goodput(bench, options.minutes * 60, options.kill_every)
                figures["goodput"] = {**figures.get("goodput", {}), f"{options.kill_every:g}": found}
            else:
                figures[name] = parts[name]()
            print(json.dumps(figures[name], indent=2), flush=True)
            write_result("training", figures)
    write_table("training table", table(json.loads(file.read_text())))


def checkpoints(bench: Bench, rounds: int, every: int = 250, num_steps: int = 520) -> dict[str, Any]:
    """The share of a run's time that it stood still to save, and how much longer it took than without."""
    shares, times = [], {"with": [], "without": []}
    for number in range(rounds):
        for name, interval in (("with", every), ("without", NEVER))[:: 1 if number % 2 else -1]:
            storage = bench.new_folder()
            bench.train(num_steps, storage, num_workers=2, checkpoint_every=interval)
            rows = rows_of(storage)[WARM_UP:]
            elapsed_s = rows[-1]["time_s"] - rows[0]["time_s"]
            times[name].append(elapsed_s)
            if name == "with":
                shares.append(sum(row["checkpoint_stall_s"] for row in rows[1:]) / elapsed_s)
    return {
        "every": every,
        "stall_share": {"median": statistics.median(shares), "all": shares},
        "with_over_without": ratio(times, "without", "with")._asdict(),
    }


def workers(bench: Bench) -> dict[str, float]:
    """Tokens a second by number of workers."""
    found = {}
    for size in (1, 2, 4):
        storage = bench.new_folder()
        bench.train(NUM_STEPS, storage, num_workers=size)
        rows = rows_of(storage)[WARM_UP:]
        found[str(size)] = sum(row["num_tokens"] for row in rows[1:]) / (rows[-1]["time_s"] - rows[0]["time_s"])
    return found


def table(figures: dict[str, Any]) -> str:
    """The README's table."""
    lines = ["| training | |", "| --- | ---: |"]
    if "loop" in figures:
        lines.append(
            f"| a step through Ray Train over one of a bare loop | {Ratio(**figures['loop']['ray_over_bare'])} |"
        )
    if "packing" in figures:
        for name, words in (("padded", "random batches"), ("padded, sorted", "batches of clips that are alike")):
            found = Ratio(**figures["packing"]["packed_over"][name])
            lines.append(f"| tokens a second, packed over {words} padded to their largest clip | {found} |")
    if "checkpoints" in figures:
        found = figures["checkpoints"]
        share = f"{100 * found['stall_share']['median']:.2f} %"
        lines.append(f"| share of a run that waits for checkpoints, one every {found['every']} steps | {share} |")
        lines.append(f"| its time over that of a run without checkpoints | {Ratio(**found['with_over_without'])} |")
    for size, rate in figures.get("workers", {}).items():
        lines.append(f"| tokens a second, {size} worker{'s' * (size != '1')} | {rate:,.0f} |")
    for every, found in figures.get("goodput", {}).items():
        text = f"{100 * found['goodput']:.1f} % (restart {found['restart_s']:.1f} s)"
        lines.append(f"| share of the time in steps that count, a worker killed every {every} s | {text} |")
    lines += ["", f"Measured until {figures['date']}: {figures['machine']}."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
