"""The README's table of the models' speed, from results/dit.json, vae.json and attention.json (CPU runs).

python benchmarks/model_table.py
"""

import argparse
import json
from typing import Any

from measure import RESULTS, write_table


def shown(ratio: dict[str, float]) -> str:
    """Median and quartiles."""
    return f"**{ratio['median']:.2f}** ({ratio['low']:.2f} to {ratio['high']:.2f})"


def read(name: str) -> dict[str, Any]:
    """A benchmark's figures."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def rows() -> list[tuple[str, str, str]]:
    """What was measured, against what, how many times faster."""
    lines = []
    for name, figures in read("dit").items():
        if isinstance(figures, dict):
            for case, ratio in figures["ratios"].items():
                what, _, peer = case.partition(", peer ")
                more = (
                    "" if peer else f"; {figures['bound_uniform']:.2f} with all but products and attention for nothing"
                )
                against = f"WanTransformer3DModel {peer or 'batched'}"
                lines.append((f"VideoDiT {name}, training, {what}", against, shown(ratio) + more))
    for name, figures in read("vae").items():
        for verb in ("encode", "decode") if isinstance(figures, dict) and "encode" in figures else ():
            for peer, against in (("peer", "as it is"), ("peer, channels last", "channels last")):
                ratio = figures[verb][peer]["ours_is_faster_by"]
                lines.append((f"VideoVAE {name}, {verb}", f"AutoencoderKLWan {against}", shown(ratio)))
    for figures in read("attention").values():
        if isinstance(figures, dict):
            for peer, row in figures["forward_and_backward"].items():
                if peer != "sdpa":
                    lines.append(("packed attention, training", peer, shown(row["sdpa_is_faster_by"])))
    return lines


def main() -> None:
    """Write the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    memory = read("vae")["stream_memory"]["ratio"]
    lines = ["| what | against | times as fast (median, quartiles) |", "| --- | --- | --- |"]
    lines += [f"| {what} | {against} | {value} |" for what, against, value in rows()]
    lines += ["", f"A stream ten times as long is decoded in {memory:.3f} times the memory."]
    lines += [f"Measured on {read('vae')['date']}: {read('vae')['machine']}, fp32, peers interleaved in one run."]
    write_table("model table", "\n".join(lines))


if __name__ == "__main__":
    main()
