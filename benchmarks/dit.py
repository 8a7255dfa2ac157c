"""VideoDiT against diffusers' WanTransformer3DModel, forward and backward, equal weights, in one interleaved run.

    python benchmarks/dit.py

Uniform: a batch of equal clips, the peer with fused projections. Mixed: clips of many shapes in one pack, against the
peer on the batch padded to the largest clip (without the mask that it cannot take, which would make it slower) and
against the peer clip by clip. Prints ratios (above 1: ours is faster) with quartiles; writes results/dit.json.
"""

import argparse
import functools
from collections.abc import Sequence

import diffusers
import torch
from measure import interleave, machine, ratio, write_result
from torch import Tensor

from video_dit.key_tables import DIFFUSERS_DIT, to_published
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.packing import pack

SIZES = {
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "ffn_dim": 1536,
    "num_layers": 6,
    "text_dim": 256,
    "in_channels": 16,
    "out_channels": 16,
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


def make_models() -> tuple[VideoDiT, diffusers.WanTransformer3DModel]:
    """Ours and theirs with equal random weights."""
    torch.manual_seed(0)
    ours = VideoDiT(VideoDiTConfig(**SIZES))
    torch.nn.init.normal_(ours.head.out.weight, std=0.02)  # zero would stop the gradients
    theirs = diffusers.WanTransformer3DModel(**SIZES)
    theirs.load_state_dict(to_published(ours.state_dict(), DIFFUSERS_DIT))
    theirs.fuse_qkv_projections()
    return ours, theirs


def make_samples(shapes: Sequence[tuple[int, int, int]]) -> tuple[list[Tensor], list[Tensor]]:
    """Latents (16 t h w) and texts (s d)."""
    generator = torch.Generator().manual_seed(1)
    latents = [torch.randn(16, *shape, generator=generator) for shape in shapes]
    return latents, [torch.randn(TEXT_TOKENS, SIZES["text_dim"], generator=generator) for _ in shapes]


def ours_packed(model: VideoDiT, latents: list[Tensor], texts: list[Tensor]) -> list[Tensor]:
    """All samples in one pack, packing included."""
    packed = pack(latents, [500.0] * len(latents), texts)
    prediction = model(packed)
    prediction.square().mean().backward()
    return packed.unpack(prediction.detach())


def theirs_batched(model: diffusers.WanTransformer3DModel, latents: Tensor, texts: Tensor) -> Tensor:
    """One batch of equal shapes, b 16 t h w and b s d."""
    prediction = model(latents, torch.full((len(latents),), 500.0), texts).sample
    prediction.square().mean().backward()
    return prediction.detach()


def theirs_one_by_one(
    model: diffusers.WanTransformer3DModel, latents: list[Tensor], texts: list[Tensor]
) -> list[Tensor]:
    """A forward and a backward pass a sample."""
    return [theirs_batched(model, x[None], text[None])[0] for x, text in zip(latents, texts, strict=True)]


def padded(latents: list[Tensor]) -> Tensor:
    """A batch as large as the largest sample along each axis."""
    most = [max(sizes) for sizes in zip(*(x.shape for x in latents), strict=True)]
    batch = torch.zeros(len(latents), *most)
    for row, x in zip(batch, latents, strict=True):
        row[:, : x.shape[1], : x.shape[2], : x.shape[3]] = x
    return batch


def main() -> None:
    """Check that both compute the same, then race them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ours, theirs = make_models()
    figures: dict[str, object] = {"sizes": SIZES, "rounds": options.rounds}
    uniform, texts = make_samples(UNIFORM)
    batch, batch_texts = torch.stack(uniform), torch.stack(texts)
    error = (torch.stack(ours_packed(ours, uniform, texts)) - theirs_batched(theirs, batch, batch_texts)).abs().max()
    times = interleave(
        {
            "ours": functools.partial(ours_packed, ours, uniform, texts),
            "theirs": functools.partial(theirs_batched, theirs, batch, batch_texts),
        },
        options.rounds,
    )
    rows = {"uniform batch": ratio(times, "ours", "theirs")}
    mixed, texts = make_samples(MIXED)
    batch, batch_texts = padded(mixed), torch.stack(texts)
    times = interleave(
        {
            "ours": functools.partial(ours_packed, ours, mixed, texts),
            "one by one": functools.partial(theirs_one_by_one, theirs, mixed, texts),
            "padded": functools.partial(theirs_batched, theirs, batch, batch_texts),
        },
        options.rounds,
    )
    rows["mixed pack, peer padded"] = ratio(times, "ours", "padded")
    rows["mixed pack, peer clip by clip"] = ratio(times, "ours", "one by one")
    useful = sum(x[0].numel() for x in mixed) / batch[:, 0].numel()
    print(f"{machine()}; largest difference {error:.1e}; {useful:.0%} of the padded batch is video")
    for name, value in rows.items():
        print(f"{name:32} {value}")
    figures |= {
        "max_abs_error": float(error),
        "useful_share": useful,
        "ratios": {k: v._asdict() for k, v in rows.items()},
    }
    print(f"wrote {write_result('dit', figures)}")


if __name__ == "__main__":
    main()
