"""What is measured of a transformer while it trains, on what it was not trained on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline import toy, toy_checker
from pipeline.feed import LatentDataset
from pipeline.mixture import Samples
from pipeline.online import OnlineDataset
from pipeline.plan import Plan, PlanConfig
from pipeline.toy_scenes import parse_caption
from video_dit.diffusion.losses import DiffusionConfig, diffusion_batch, diffusion_losses
from video_dit.generator import GenerationRequest, Generator
from video_dit.model import VideoDiT

TOY_SEED = 1  # of the prompts: others than those of evaluations


@torch.no_grad()
def held_out_losses(
    dit: VideoDiT,
    data: LatentDataset | OnlineDataset,
    samples: Samples,
    empty_text: Tensor,
    diffusion: DiffusionConfig,
    plan: PlanConfig,
) -> dict[str, float]:
    """The loss of held-out clips and that by noise level, with noise that is the same every time.

    Returns:
        "loss", and "sigma_0_0.2" and so on; nothing where no clip is held out.
    """
    places, own = samples.held_out()
    if not len(places):
        return {}
    loss, num_tokens = 0.0, 0
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
    for pack in (pack for step in Plan(own, plan).epoch(0) for pack in step.packs):
        clips = [data[int(places[number])] for number in pack]
        batch = diffusion_batch(
            latents=[clip.latents for clip in clips],
            texts=[clip.text for clip in clips],
            empty_text=empty_text,
            keys=[("held out", clip.clip_id) for clip in clips],
            config=diffusion,
            patch=dit.config.patch,
        )
        found = diffusion_losses(dit, batch)
        loss += float(found.trained["loss"])
        num_tokens += batch.packed.num_tokens
        for name, figures in found.logged.items():
            sums[name] += torch.stack(figures).double().cpu()
    by_level = {name: float(total / count) for name, (total, count) in sums.items() if count}
    return {"loss": loss / num_tokens, **by_level}


def is_toy_world(captions: Sequence[str]) -> bool:
    """Whether captions state scenes of the toy world; looks at a few."""
    try:
        for caption in captions[:: max(1, len(captions) // 8)]:
            parse_caption(caption)
    except ValueError:
        return False
    return bool(captions)


def toy_scores(generator: Generator, num_prompts: int) -> dict[str, float]:
    """Shares of right videos of held-out scenes, by attribute and "all": "toy_colour" and so on."""
    prompts = toy.evaluation_prompts(num_prompts, TOY_SEED)
    requests = [
        GenerationRequest(prompt=p.caption, num_frames=p.shape.t, height_px=p.shape.h, width_px=p.shape.w, seed=number)
        for number, p in enumerate(prompts)
    ]
    verdicts = [
        toy_checker.score(video.numpy(), request.prompt)
        for video, request in zip(generator(requests), requests, strict=True)
    ]
    return {f"toy_{name}": share for name, share in toy_checker.score_table(verdicts).items()}
