"""Videos from images and videos: are given frames kept, and does the motion go on across the seam?

    python benchmarks/conditioning.py --model runs/train_video/<run>

Rendered held-out scenes give the frames of each mode; the exact judge then looks at the whole video, given and made
frames together: it is right in motion only if both move as one. Captions tell the motion, as ever.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from measure import write_result, write_table
from sampling import BATCH, SEED, model_of
from torch import Tensor

from pipeline import toy, toy_checker
from pipeline.toy_scenes import COLOURS, caption
from video_dit import conditions
from video_dit.generator import GenerationRequest, Generator

MOTION = ("direction", "speed")
STRENGTH = 0.8  # of an edit: colours go


@dataclasses.dataclass(frozen=True)
class Clip:
    """A rendered scene, t h w 3."""

    prompt: toy.EvaluationPrompt
    video_u8: Tensor

    def groups(self, share: float) -> int:
        """Groups of four frames, behind the first one, in a share of the clip."""
        return int((len(self.video_u8) - 1) // 4 * share)


def image_to_video(clip: Clip, **fields: Any) -> GenerationRequest:
    """From the first frame."""
    return conditions.image_to_video(clip.video_u8[0], num_frames=len(clip.video_u8), **fields)


def first_last(clip: Clip, **fields: Any) -> GenerationRequest:
    """Between the first and the last frame."""
    return conditions.first_last(clip.video_u8[0], clip.video_u8[-1], num_frames=len(clip.video_u8), **fields)


def extend_forwards(clip: Clip, **fields: Any) -> GenerationRequest:
    """Behind the first frames."""
    num = 1 + 4 * clip.groups(1 / 2)
    return conditions.extend_forwards(clip.video_u8[:num], num_new_frames=len(clip.video_u8) - num, **fields)


def extend_backwards(clip: Clip, **fields: Any) -> GenerationRequest:
    """Before the last frames."""
    num = 4 * clip.groups(1 / 2)
    return conditions.extend_backwards(clip.video_u8[-num:], num_new_frames=len(clip.video_u8) - num, **fields)


def in_between(clip: Clip, **fields: Any) -> GenerationRequest:
    """Between the first and the last frames."""
    first, last = 1 + 4 * clip.groups(1 / 3), 4 * max(1, clip.groups(1 / 3))
    gap = len(clip.video_u8) - first - last
    return conditions.in_between(clip.video_u8[:first], clip.video_u8[-last:], gap=gap, **fields)


def loop(clip: Clip, **fields: Any) -> GenerationRequest:
    """From the first frames back to them: of still objects, since none of the toy world turns round."""
    first = 1 + 4 * clip.groups(1 / 2)
    return conditions.loop(clip.video_u8[:first], gap=len(clip.video_u8) - first, **fields)


def edit(clip: Clip, **fields: Any) -> GenerationRequest:
    """The same in another colour."""
    scene = clip.prompt.scene
    colours = list(COLOURS)
    other = colours[(colours.index(scene.colour) + 1) % len(colours)]
    words = caption(dataclasses.replace(scene, colour=other), 0)
    return conditions.edit(clip.video_u8, sigma=STRENGTH, **{**fields, "prompt": words})


MODES: tuple[Callable[..., GenerationRequest], ...] = (
    image_to_video,
    first_last,
    extend_forwards,
    extend_backwards,
    in_between,
    loop,
    edit,
)


def render(num: int) -> list[Clip]:
    """Held-out scenes with motion, or explicitly none."""
    random = np.random.default_rng(SEED)
    prompts = [prompt for prompt in toy.evaluation_prompts(2 * num, SEED) if not prompt.scene.is_image][:num]
    clips = []
    for prompt in sorted(prompts, key=lambda prompt: prompt.shape):
        start = toy.draw_start(prompt.scene, prompt.shape, random)
        clips.append(Clip(prompt, torch.from_numpy(toy.render(prompt.scene, *prompt.shape, start))))
    return clips


def psnr_db(video_u8: Tensor, request: GenerationRequest) -> float:
    """Of the given frames in the video; infinite where they are the same."""
    errors = [
        (video_u8[given.start : given.stop].double() - given.frames.double()).square().mean()
        for given in request.conditions
    ]
    return float(10 * torch.log10(255**2 / torch.stack(errors).max())) if errors else float("nan")


def judge(mode: Callable[..., GenerationRequest], video_u8: Tensor, request: GenerationRequest) -> dict[str, bool]:
    """What is right of a finished video; a loop is shown one and a half times."""
    shown = torch.cat([video_u8, video_u8[: len(video_u8) // 2]]) if mode is loop else video_u8
    verdict = toy_checker.score(shown.numpy(), request.prompt)
    return {"motion": all(verdict[name] for name in MOTION if name in verdict), "all": verdict["all"]}


def measure(
    mode: Callable[..., GenerationRequest], clips: Sequence[Clip], generator: Generator, **fields: Any
) -> dict[str, Any]:
    """One mode's figures."""
    if mode is loop:
        clips = [clip for clip in clips if clip.prompt.scene.direction == "still"]
    requests = [mode(clip, prompt=clip.prompt.caption, seed=seed, **fields) for seed, clip in enumerate(clips)]
    videos = [video for start in range(0, len(requests), BATCH) for video in generator(requests[start : start + BATCH])]
    verdicts = [judge(mode, video, request) for video, request in zip(videos, requests, strict=True)]
    figures = {
        "clips": len(clips),
        "psnr_db": min(psnr_db(video, request) for video, request in zip(videos, requests, strict=True)),
        "motion": float(np.mean([verdict["motion"] for verdict in verdicts])),
        "all": float(np.mean([verdict["all"] for verdict in verdicts])),
    }
    print(mode.__name__, figures, flush=True)
    return figures


def text_to_video(clip: Clip, **fields: Any) -> GenerationRequest:
    """From the caption alone: what the model can do without given frames."""
    num_frames, height_px, width_px, _ = clip.video_u8.shape
    return GenerationRequest(num_frames=num_frames, height_px=height_px, width_px=width_px, **fields)


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """A row a mode."""
    lines = ["| mode | clips | given frames, PSNR | motion right across the seam | all right |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for name, row in found.items():
        psnr = {"inf": "exact", "nan": "none given"}.get(str(row["psnr_db"]), f"{row['psnr_db']:.1f} dB")
        shares = f"{100 * row['motion']:.1f} % | {100 * row['all']:.1f} %"
        lines.append(f"| {name.replace('_', ' ')} | {row['clips']} | {psnr} | {shares} |")
    return lines


def main() -> None:
    """Measure every mode, write JSON and the README's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="run or folder of a model of the toy world")
    parser.add_argument("--guidance-scale", type=float, help="else the model's own")
    parser.add_argument("--num", type=int, default=100, help="scenes of each mode")
    options = parser.parse_args()
    clips, generator = render(options.num), Generator.from_pretrained(model_of(options.model))
    found = {
        mode.__name__: measure(mode, clips, generator, guidance_scale=options.guidance_scale)
        for mode in (text_to_video, *MODES)
    }
    judged = toy_checker.score_table([toy_checker.score(clip.video_u8.numpy(), clip.prompt.caption) for clip in clips])
    print(f"the judge of the rendered clips themselves: {judged['all']:.3f}")
    write_result(
        "conditioning",
        {"clips": len(clips), "modes": {n: {**r, "psnr_db": str(r["psnr_db"])} for n, r in found.items()}},
    )
    write_table("conditioning table", "\n".join(table(found)))


if __name__ == "__main__":
    main()
