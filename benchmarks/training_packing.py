"""Packed steps against batches padded to their largest clip."""

from __future__ import annotations

import functools
import itertools
import random
import statistics
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from measure import interleave, ratio
from torch.nn.functional import scaled_dot_product_attention
from training_runs import Bench

from pipeline.plan import Plan
from pipeline.train_video import VideoTrainee
from video_dit.attention import attend
from video_dit.diffusion.losses import DiffusionBatch, diffusion_batch, diffusion_losses
from video_dit.random import keyed_normal


def packing(bench: Bench, num_packs: int = 24) -> dict[str, Any]:
    """Tokens a second of real clips, in packs and in padded batches of the same clips.

    "padded": the clips in random order, as many in each batch as there are in a pack. "padded, sorted": those of each
    pack in a batch, and packs have clips that are alike. Each masks its padding; "no mask" trains on it.
    """
    torch.set_num_threads(2)
    task, trainee = bench.task, bench.task.build()
    packs = [pack for step in Plan(trainee.samples, task.plan).epoch(0) for pack in step.packs]
    packs = random.Random(0).sample(packs, num_packs)
    places = [place for pack in packs for place in pack]
    random.Random(1).shuffle(places)
    parts = iter(places)
    batches = {"padded": [tuple(itertools.islice(parts, len(pack))) for pack in packs], "padded, sorted": packs}
    packed = [trainee.load(0, pack) for pack in packs]
    candidates: dict[str, Callable[[], None]] = {"packed": lambda: _run_all(trainee, packed)}
    for name, groups in batches.items():
        padded, masks = [_padded(trainee, group) for group in groups], [_mask(trainee, group) for group in groups]
        candidates[name] = functools.partial(_run_all, trainee, padded, masks)
        candidates[f"{name}, no mask"] = functools.partial(_run_all, trainee, padded)
    useful = int(trainee.samples.num_tokens[places].sum())
    times = interleave(candidates, rounds=5)
    return {
        "packed_over": {name: ratio(times, "packed", name)._asdict() for name in candidates if name != "packed"},
        "tokens_per_s": {name: useful / statistics.median(values) for name, values in times.items()},
        "padding": {
            name: sum(len(group) * _grid_tokens(trainee, group) for group in groups) / useful
            for name, groups in batches.items()
        },
    }


def _largest(trainee: VideoTrainee, pack: tuple[int, ...]) -> tuple[int, int, int]:
    shapes = [trainee.data.shapes[place] for place in pack]
    return max(s.t for s in shapes), max(s.h for s in shapes), max(s.w for s in shapes)


def _grid_tokens(trainee: VideoTrainee, pack: tuple[int, ...]) -> int:
    t, h, w = _largest(trainee, pack)
    patch = trainee.task.dit.patch
    return (t // patch.t) * (h // patch.h) * (w // patch.w)


def _padded(trainee: VideoTrainee, pack: tuple[int, ...]) -> DiffusionBatch:
    """Noise of the largest clip's shape for each clip, with texts as long as the longest."""
    shape = (trainee.task.dit.in_channels, *_largest(trainee, pack))
    samples = [trainee.data[place] for place in pack]
    length = max(len(sample.text) for sample in samples)
    return diffusion_batch(
        latents=[keyed_normal(shape, sample.clip_id) for sample in samples],
        texts=[keyed_normal((length, sample.text.shape[1]), sample.clip_id) for sample in samples],
        empty_text=keyed_normal((length, samples[0].text.shape[1]), 0),
        keys=[(0, sample.clip_id) for sample in samples],
        config=trainee.task.diffusion,
        patch=trainee.task.dit.patch,
    )


def _mask(trainee: VideoTrainee, pack: tuple[int, ...]) -> torch.Tensor:
    """b n, of the padded batch: which tokens are of the clips."""
    patch, largest = trainee.task.dit.patch, _largest(trainee, pack)
    mask = torch.zeros(len(pack), *(side // step for side, step in zip(largest, patch, strict=True)), dtype=torch.bool)
    for number, place in enumerate(pack):
        t, h, w = trainee.data.shapes[place].grid(patch)
        mask[number, :t, :h, :w] = True
    return mask.flatten(1)


def _masked(mask: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: object) -> torch.Tensor:
    """Stands for `attend` of a batch of equal samples, whose padding is no key: n heads e each."""
    del segments
    q, k, v = (rearrange(x, "(b n) heads e -> b heads n e", b=len(mask)) for x in (q, k, v))
    y = scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
    return rearrange(y, "b heads n e -> (b n) heads e")


def _run_all(trainee: VideoTrainee, batches: list[DiffusionBatch], masks: list[torch.Tensor] | None = None) -> None:
    for number, batch in enumerate(batches):
        for block in trainee.model.blocks:
            block.self_attention.attend = attend if masks is None else functools.partial(_masked, masks[number])
        trainee.model.zero_grad()
        diffusion_losses(trainee.model, batch).trained["loss"].backward()
