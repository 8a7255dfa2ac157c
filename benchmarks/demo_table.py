"""The README's table of a finished demo: time and result of each hop, read from the reports below a storage folder.

    make demo
    python benchmarks/demo_table.py --storage runs --json benchmarks/results/demo.json

Rewrites the README between its two marks, from the JSON file alone.
"""

import argparse
import datetime
import json
import os
import platform
from pathlib import Path

import torch
from measure import write_table

ROOT = Path(__file__).parents[1]
VERBS = {
    "toy": "make_toy_clips.py",
    "curate": "curate_clips.py",
    "train_vae": "train_vae.py",
    "encode": "encode_clips.py",
    "train_video": "train_video.py",
    "sample_video": "sample_video.py",
    "evaluate_video": "evaluate_video.py",
}


def read_hops(storage: Path) -> dict[str, dict[str, float]]:
    """The report of the newest result of each verb, with the last losses of a training run."""
    hops = {}
    for verb in VERBS:
        manifest = max(storage.glob(f"{verb}/*/manifest.json"), key=lambda path: path.stat().st_mtime)
        report = json.loads((manifest.parent / "report.json").read_text())
        log = manifest.parent / "metrics" / "train.jsonl"
        if log.exists():
            rows = [json.loads(line) for line in log.read_text().splitlines()]
            report["final_loss"] = sum(row["loss"] for row in rows[-50:]) / len(rows[-50:])
            seconds = sum(row["step_s"] for row in rows)
            report["tokens_per_s"] = sum(row["num_tokens"] for row in rows) / seconds
            report["data_wait_share"] = sum(row["data_wait_s"] for row in rows) / seconds
        hops[verb] = report
    return hops


def result_of(verb: str, report: dict[str, float]) -> str:
    """A hop's result in words."""
    match verb:
        case "toy":
            return f"{report['clips']:,} clips, {report['clips_per_s']:.0f} clips/s"
        case "curate":
            return f"{report['clips']:,} clips, {report['rejects']} rejects"
        case "train_vae":
            loss, psnr = report["final_loss"], report["psnr_db"]
            return f"{report['step']:,} steps, loss {loss:.4f}, {psnr:.1f} dB PSNR on whole clips"
        case "encode":
            return f"{report['latents']:,} latents, {report['frames_per_s']:.0f} frames/s"
        case "train_video":
            size, loss = f"{report['num_parameters'] / 1e6:.1f} M parameters", f"loss {report['final_loss']:.4f}"
            return f"{size}, {report['step']:,} steps, {loss}, {report['tokens_per_s']:,.0f} tokens/s"
        case "sample_video":
            return f"{report['videos']} videos, {report['frames_per_s']:.0f} frames/s"
        case _:
            return f"**{100 * report['score_all']:.1f} %** of {report['videos']} videos right in all attributes"


def table(measured: dict) -> str:
    """Markdown: a row a hop, then the score by attribute."""
    lines = ["| hop | seconds | result | command |", "| --- | ---: | --- | --- |"]
    for verb, report in measured["hops"].items():
        command = f"`python jobs/{VERBS[verb]}`"
        lines.append(f"| {verb} | {report['elapsed_s']:.0f} | {result_of(verb, report)} | {command} |")
    total_s = sum(report["elapsed_s"] for report in measured["hops"].values())
    lines.append(f"| all | {total_s:.0f} | | `make demo` |")
    scores = {
        name.removeprefix("score_"): v for name, v in measured["hops"]["evaluate_video"].items() if "score_" in name
    }
    lines += ["", "| held-out scenes | " + " | ".join(scores) + " |", "| --- |" + " ---: |" * len(scores)]
    lines.append("| share right | " + " | ".join(f"{100 * value:.1f} %" for value in scores.values()) + " |")
    lines += ["", f"Measured on {measured['date']}: {measured['machine']}."]
    return "\n".join(lines)


def main() -> None:
    """Measure, write the JSON, rewrite the README's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", type=Path, help="of a finished demo; without it the JSON is only shown again")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "demo.json")
    options = parser.parse_args()
    if options.storage:
        newest = max(path.stat().st_mtime for path in options.storage.glob("evaluate_video/*/manifest.json"))
        machine = f"{os.cpu_count()} cores {platform.machine()} ({torch.backends.cpu.get_cpu_capability()}), no GPU"
        date = datetime.date.fromtimestamp(newest).isoformat()
        measured = {"date": date, "machine": machine, "hops": read_hops(options.storage)}
        options.json.write_text(json.dumps(measured, indent=2) + "\n")
    write_table("demo table", table(json.loads(options.json.read_text())))


if __name__ == "__main__":
    main()
