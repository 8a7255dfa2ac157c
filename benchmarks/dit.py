"""VideoDiT forward and backward: on a CPU against diffusers' WanTransformer3DModel, on a GPU against the GPU's ceiling.

    python benchmarks/dit.py

On a CPU (fp32), equal weights, one interleaved run. Uniform: a batch of equal clips, the peer with fused projections;
beside the ratio stands the one that a model would reach that spent no time but in matrix products and attention, which
both do by the same kernels. Mixed: clips of many shapes in one pack, against the peer on the batch padded to the
largest clip (without the mask that it cannot take, which would make it slower) and against the peer clip by clip.
On a GPU (bf16), at Wan-1.3B's sizes: TFLOP/s of model operations, share of a GEMM's and peak memory, forward and in
training, by activation checkpointing and compilation. Needs no Ray. Ratios (above 1: ours is faster) have quartiles.
Writes results/dit.json.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measure import gemm_ceiling, interleave, machine, peak_memory_bytes, ratio, write_result
from torch import Tensor

from video_dit.flops import TRAINING_FACTOR, forward_flops
from video_dit.key_tables import DIFFUSERS_DIT, to_published
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.packing import PackedBatch, pack
from video_dit.parallel.activation_checkpointing import Checkpointing, checkpoint_block
from video_dit.parallel.block_compile import compile_blocks

COMMON = {"text_dim": 256, "in_channels": 16, "out_channels": 16}
WIDTHS = {
    "width 256, 4 layers": {
        "num_attention_heads": 4,
        "attention_head_dim": 64,
        "ffn_dim": 1024,
        "num_layers": 4,
        **COMMON,
    },
    "width 384, 6 layers": {
        "num_attention_heads": 6,
        "attention_head_dim": 64,
        "ffn_dim": 1536,
        "num_layers": 6,
        **COMMON,
    },
}
TEXT_TOKENS = 64
UNIFORM = [(5, 16, 16)] * 4  # latent frames, rows, columns
MIXED = [
    (1, 16, 16),
    (1, 8, 16),
    (2, 8, 8),
    (3, 8, 16),
    (3, 16, 8),
    (5, 8, 8),
    (5, 16, 16),
    (9, 8, 16),
    (1, 32, 16),
    (9, 16, 32),
]
# Of Wan 2.1's VAE: 33x256x448, 81x480x832, and clips and images of many sizes.
GPU_CASES = {
    "33x256x448": [(9, 32, 56)],
    "81x480x832": [(21, 60, 104)],
    "mixed pack": [(1, 60, 104)] * 4 + [(5, 32, 32)] * 4 + [(9, 32, 56)] * 3 + [(17, 32, 56), (9, 60, 104)],
}
KERNELS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product")


def make_samples(
    shapes: Sequence[tuple[int, int, int]], text_dim: int, text_tokens: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Latents (16 t h w) and texts (s d)."""
    generator = torch.Generator().manual_seed(1)
    latents = [torch.randn(16, *shape, generator=generator) for shape in shapes]
    return latents, [torch.randn(text_tokens, text_dim, generator=generator) for _ in shapes]


# --- on a CPU -------------------------------------------------------------------------------------------------------


def make_models(sizes: dict[str, int]) -> tuple[VideoDiT, Any]:
    """Ours and theirs with equal random weights."""
    import diffusers  # here, since a GPU machine may lack it

    torch.manual_seed(0)
    ours = VideoDiT(VideoDiTConfig(**sizes))
    torch.nn.init.normal_(ours.head.out.weight, std=0.02)  # zero would stop the gradients
    theirs = diffusers.WanTransformer3DModel(**sizes)
    theirs.load_state_dict(to_published(ours.state_dict(), DIFFUSERS_DIT))
    theirs.fuse_qkv_projections()
    return ours, theirs


def ours_packed(model: VideoDiT, latents: list[Tensor], texts: list[Tensor]) -> list[Tensor]:
    """All samples in one pack, packing included."""
    packed = pack(latents, [500.0] * len(latents), texts)
    prediction = model(packed)
    prediction.square().mean().backward()
    return packed.unpack(prediction.detach())


def theirs_batched(model: Any, latents: Tensor, texts: Tensor) -> Tensor:
    """One batch of equal shapes, b 16 t h w and b s d."""
    prediction = model(latents, torch.full((len(latents),), 500.0), texts).sample
    prediction.square().mean().backward()
    return prediction.detach()


def theirs_one_by_one(model: Any, latents: list[Tensor], texts: list[Tensor]) -> list[Tensor]:
    """A forward and a backward pass a sample."""
    return [theirs_batched(model, x[None], text[None])[0] for x, text in zip(latents, texts, strict=True)]


def padded(latents: list[Tensor]) -> Tensor:
    """A batch as large as the largest sample along each axis."""
    most = [max(sizes) for sizes in zip(*(x.shape for x in latents), strict=True)]
    batch = torch.zeros(len(latents), *most)
    for row, x in zip(batch, latents, strict=True):
        row[:, : x.shape[1], : x.shape[2], : x.shape[3]] = x
    return batch


def kernel_share(candidate: Callable[[], object]) -> float:
    """Share of a call's time inside matrix products and attention; the median of three."""
    shares = []
    for _ in range(3):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            candidate()
        times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
        shares.append(sum(time for key, time in times.items() if key.startswith(KERNELS)) / sum(times.values()))
    return statistics.median(shares)


def race_on_cpu(name: str, sizes: dict[str, int], rounds: int) -> dict[str, Any]:
    """Check that both compute the same, then race them."""
    ours, theirs = make_models(sizes)
    uniform, texts = make_samples(UNIFORM, sizes["text_dim"], TEXT_TOKENS)
    batch, batch_texts = torch.stack(uniform), torch.stack(texts)
    error = (torch.stack(ours_packed(ours, uniform, texts)) - theirs_batched(theirs, batch, batch_texts)).abs().max()
    calls = {
        "ours": functools.partial(ours_packed, ours, uniform, texts),
        "theirs": functools.partial(theirs_batched, theirs, batch, batch_texts),
    }
    times = interleave(calls, rounds)
    rows = {"uniform batch": ratio(times, "ours", "theirs")}
    bound = rows["uniform batch"].median / kernel_share(calls["ours"])
    mixed, texts = make_samples(MIXED, sizes["text_dim"], TEXT_TOKENS)
    batch, batch_texts = padded(mixed), torch.stack(texts)
    times = interleave(
        {
            "ours": functools.partial(ours_packed, ours, mixed, texts),
            "one by one": functools.partial(theirs_one_by_one, theirs, mixed, texts),
            "padded": functools.partial(theirs_batched, theirs, batch, batch_texts),
        },
        rounds,
    )
    rows["mixed pack, peer padded"] = ratio(times, "ours", "padded")
    rows["mixed pack, peer clip by clip"] = ratio(times, "ours", "one by one")
    useful = sum(x[0].numel() for x in mixed) / batch[:, 0].numel()
    print(f"{name}: largest difference {error:.1e}; {useful:.0%} of the padded batch is video")
    for row, value in rows.items():
        more = f"; {bound:.2f} with matrix products and attention alone" if row == "uniform batch" else ""
        print(f"  {row:32} {value}{more}", flush=True)
    figures = {"sizes": sizes, "max_abs_error": float(error), "useful_share": useful, "bound_uniform": bound}
    return {**figures, "ratios": {row: value._asdict() for row, value in rows.items()}}


# --- on a GPU -------------------------------------------------------------------------------------------------------


def make_prepared(config: VideoDiTConfig, form: Checkpointing, is_compiled: bool, device: str) -> VideoDiT:
    """A bf16 model as `parallelize` would prepare it for one process."""
    with torch.device(device):
        model = VideoDiT(config).to(torch.bfloat16)
    torch.nn.init.normal_(model.head.out.weight, std=0.02)
    if is_compiled:
        compile_blocks(model.blocks)
    for block in model.blocks:
        checkpoint_block(block, form)
    return model


def forward(model: VideoDiT, packed: PackedBatch) -> None:
    """As in sampling."""
    with torch.no_grad():
        model(packed)


def train(model: VideoDiT, packed: PackedBatch) -> None:
    """Forward and backward."""
    model(packed).float().square().mean().backward()
    model.zero_grad(set_to_none=True)


def measure_on_gpu(config: VideoDiTConfig, rounds: int, ceiling: float, device: str = "cuda") -> dict[str, Any]:
    """A row for each case, way to prepare the model, and pass; what does not fit into memory is said so."""
    figures: dict[str, Any] = {}
    for name, shapes in GPU_CASES.items():
        packed = pack(*_with_timesteps(*make_samples(shapes, config.text_dim, 512))).to(device)
        for is_compiled in (False, True):
            for form in ("none", "selective", "block"):
                model = make_prepared(config, form, is_compiled, device)
                for step, flops in ((forward, 1), (train, TRAINING_FACTOR)):
                    if step is forward and form != "none":
                        continue
                    label = f"{name}, {step.__name__}, checkpoint {form}{', compiled' * is_compiled}"
                    call = functools.partial(step, model, packed)
                    try:
                        times = interleave({"ours": call}, rounds, warm_up=3)["ours"]
                    except torch.OutOfMemoryError:
                        print(f"{label:55} does not fit")
                        continue
                    rate = flops * forward_flops(config, packed.lengths, packed.text_lengths) / statistics.median(times)
                    memory = peak_memory_bytes(call)
                    print(
                        f"{label:55} {packed.num_tokens:6} tokens {statistics.median(times) * 1e3:9.1f} ms "
                        f"{rate / 1e12:7.1f} TFLOP/s {rate / ceiling:6.1%} of a GEMM, {(memory or 0) / 1e9:.1f} GB"
                    )
                    figures[label] = {"median_s": statistics.median(times), "flop_per_s": rate}
                    figures[label] |= {"share_of_gemm": rate / ceiling, "peak_memory_bytes": memory}
    return figures


def _with_timesteps(latents: list[Tensor], texts: list[Tensor]) -> tuple[list[Tensor], list[float], list[Tensor]]:
    return latents, [500.0] * len(latents), texts


def main() -> None:
    """All that this machine can measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine())
    figures: dict[str, Any] = {"rounds": options.rounds}
    if torch.cuda.is_available():
        figures["gemm_flop_per_s"] = gemm_ceiling()
        figures |= measure_on_gpu(VideoDiTConfig(), options.rounds, figures["gemm_flop_per_s"])
    else:
        for name, sizes in WIDTHS.items():
            figures[name] = race_on_cpu(name, sizes, options.rounds)
    print(f"wrote {write_result('dit', figures)}")


if __name__ == "__main__":
    main()
