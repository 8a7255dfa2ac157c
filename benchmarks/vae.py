"""VideoVAE against diffusers' AutoencoderKLWan, encode and decode, equal weights, in one interleaved run.

    python benchmarks/vae.py

The process keeps the memory that it frees, as Kinoray's workers do; that helps both.
On a CPU (fp32): a narrow VAE on one clip and on a batch of four, and Wan 2.1's own width; the peer as it is and in its
best form (channels_last_3d, faster of the two counts), and the peak memory of processes that decode streams of two
lengths. On a GPU (bf16): Wan 2.1's VAE at two sizes, whole and streamed, in TFLOP/s and as a share of a GEMM.
Prints ratios (above 1: ours is faster) with quartiles; writes results/vae.json.
"""

import argparse
import functools
import itertools
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from measure import gemm_ceiling, interleave, machine, peak_memory_bytes, ratio, write_result
from torch import Tensor, nn

from pipeline.heap import keep_freed_memory
from video_dit.vae import VideoVAE, VideoVAEConfig
from video_dit.vae_convs import use_channels_last

ENCODE_FLOPS, DECODE_FLOPS = 5.1e6, 8.55e6  # a pixel of video, at Wan 2.1's width
SHORT, LONG = 5, 50  # latent frames of the streams whose memory is compared


class Case(NamedTuple):
    """A VAE and the clips it is run on."""

    name: str
    base_dim: int
    batch: int
    frames: int
    height_px: int
    width_px: int

    @property
    def num_pixels(self) -> int:
        """Of all clips."""
        return self.batch * self.frames * self.height_px * self.width_px


CPU_CASES = [
    Case("width 16, 17x64x64", 16, 1, 17, 64, 64),
    Case("width 16, 4 of 17x64x64", 16, 4, 17, 64, 64),
    Case("width 96 (Wan), 17x64x64", 96, 1, 17, 64, 64),
    Case("width 96 (Wan), 17x96x96", 96, 1, 17, 96, 96),
]
GPU_CASES = [Case("17x256x256", 96, 1, 17, 256, 256), Case("81x480x832", 96, 1, 81, 480, 832)]


def make_models(case: Case, device: str, dtype: torch.dtype) -> tuple[VideoVAE, nn.Module, nn.Module]:
    """Ours, theirs as it is and theirs in channels_last_3d, with equal random weights."""
    torch.manual_seed(0)
    theirs, best = (diffusers.AutoencoderKLWan(base_dim=case.base_dim).eval() for _ in range(2))
    best.load_state_dict(theirs.state_dict())
    ours = VideoVAE(VideoVAEConfig(base_dim=case.base_dim)).eval()
    ours.load_state_dict(theirs.state_dict())
    for model in (ours, best):
        use_channels_last(model)
    return ours.to(device, dtype), theirs.to(device, dtype), best.to(device, dtype)


def make_calls(case: Case, device: str, dtype: torch.dtype) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """What races what: encode and decode by each of the three, checked to give the same."""
    ours, theirs, best = make_models(case, device, dtype)
    generator = torch.Generator().manual_seed(1)
    video = torch.rand(case.batch, 3, case.frames, case.height_px, case.width_px, generator=generator) * 2 - 1
    video = video.to(device, dtype)
    inner = video.contiguous(memory_format=torch.channels_last_3d)
    latents = ours.encode(video).mean
    mean, std = (latents.new_tensor(v).view(-1, 1, 1, 1) for v in (ours.config.latents_mean, ours.config.latents_std))
    raw = latents * std + mean
    chunks = latents.split(1, dim=2)
    calls: dict[str, dict[str, Callable[[], Tensor]]] = {
        "encode": {
            "ours": lambda: ours.encode(video).raw_mean,
            "peer": lambda: theirs.encode(video).latent_dist.mean,
            "peer, channels last": lambda: best.encode(inner).latent_dist.mean,
        },
        "decode": {
            "ours": lambda: ours.decode(latents),
            "ours, streamed": lambda: torch.cat(list(ours.decode_stream(chunks)), dim=2),
            "peer": lambda: theirs.decode(raw).sample,
            "peer, channels last": lambda: best.decode(raw).sample,
        },
    }
    if case.num_pixels > 1e7:  # whole, it would not fit
        del calls["decode"]["ours"]
        calls["encode"] = {"ours, streamed": lambda: torch.cat(list(ours.encode_stream(split_video(video))), dim=2)}
    return calls


def split_video(video: Tensor) -> list[Tensor]:
    """The first frame, then groups of four."""
    return [video[:, :, :1], *video[:, :, 1:].split(4, dim=2)]


def largest_difference(calls: dict[str, Callable[[], Tensor]]) -> float:
    """Between any two that should give the same."""
    outputs = [call() for call in calls.values()]
    return max((float((a - b).abs().max()) for a, b in itertools.combinations(outputs, 2)), default=0.0)


@torch.no_grad()
def race(case: Case, rounds: int, device: str, dtype: torch.dtype, ceiling: float) -> dict[str, object]:
    """Print a row for each competitor and return the numbers."""
    figures: dict[str, object] = {}
    for (verb, calls), flops in zip(make_calls(case, device, dtype).items(), (ENCODE_FLOPS, DECODE_FLOPS), strict=True):
        error = largest_difference(calls)
        if error > (1e-4 if dtype == torch.float32 else 0.2):
            raise AssertionError(f"{case.name}, {verb}: they differ by {error}")
        times = interleave(calls, rounds)
        ours = "ours" if "ours" in calls else "ours, streamed"
        rows = {}
        for name, call in calls.items():
            median_s, faster = statistics.median(times[name]), ratio(times, ours, name)
            rows[name] = {"median_s": median_s, "ours_is_faster_by": faster._asdict()}
            text = f"{case.name:28} {verb} {name:20} {median_s * 1e3:9.1f} ms  ours is faster by {faster}"
            if device == "cuda":
                rate = case.num_pixels * flops / median_s
                rows[name] |= {"flop_per_s": rate, "share_of_gemm": rate / ceiling}
                rows[name] |= {"peak_memory_bytes": peak_memory_bytes(call)}
                text += f"  {rate / 1e12:6.1f} TFLOP/s, {rate / ceiling:5.1%} of a GEMM"
            print(text, flush=True)
        figures[verb] = {"max_abs_difference": error, **rows}
    return figures


@torch.no_grad()
def decode_a_stream(num_latents: int) -> None:
    """Decode that many latent frames one by one, keeping none, and print the process's peak memory in bytes."""
    vae = use_channels_last(VideoVAE(VideoVAEConfig(base_dim=32)).eval())
    generator = torch.Generator().manual_seed(0)
    latents = (torch.randn(1, 16, 1, 12, 12, generator=generator) for _ in range(num_latents))
    for _ in vae.decode_stream(latents):
        pass
    status = Path("/proc/self/status").read_text()  # not getrusage, which counts what the parent had
    print(int(status.split("VmHWM:")[1].split()[0]) * 1024)


def stream_memory() -> dict[str, float]:
    """Peak memory of a long stream's process over that of a short one's."""
    command = [sys.executable, __file__, "--stream"]
    short, long = (
        int(subprocess.run([*command, str(length)], check=True, capture_output=True, text=True).stdout)
        for length in (SHORT, LONG)
    )
    sizes = f"{long / 1e6:.0f} MB / {short / 1e6:.0f} MB = {long / short:.3f}"
    print(f"decode_stream, peak memory for {LONG} latent frames against {SHORT}: {sizes}")
    return {"short_bytes": short, "long_bytes": long, "ratio": long / short}


def main() -> None:
    """All cases of this machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--stream", type=int, default=0, help="only decode a stream of so many latents, print the memory"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    if options.stream:
        decode_a_stream(options.stream)
        return
    on_a_gpu = torch.cuda.is_available()
    run = functools.partial(
        race, rounds=options.rounds, device="cuda" if on_a_gpu else "cpu",
        dtype=torch.bfloat16 if on_a_gpu else torch.float32, ceiling=gemm_ceiling(),
    )  # fmt: skip
    print(machine())
    figures: dict[str, object] = {"rounds": options.rounds}
    figures |= {case.name: run(case) for case in (GPU_CASES if on_a_gpu else CPU_CASES)}
    if not on_a_gpu:
        figures["stream_memory"] = stream_memory()
    print(f"wrote {write_result('vae', figures)}")


if __name__ == "__main__":
    main()
