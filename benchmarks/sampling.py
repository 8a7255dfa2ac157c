"""How good sampling is, and what it costs: samplers and steps, guidance, a distilled student, a classifier, the cache.

    python benchmarks/sampling.py --model runs/train_video/<run> --student runs/distill_video/<run>

A model of the toy world makes held-out scenes; the exact judge says how many are right in all attributes, and a Frechet
distance of fixed features how far the videos are from rendered ones. Every setting makes the same scenes from the same
seeds, so their differences are paired. Parts are measured one by one, and added to results/sampling.json.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from frechet import features_of, frechet_distance
from measure import RESULTS, interleave, ratio, write_result
from torch import Tensor

from pipeline import toy, toy_checker
from pipeline.heap import keep_freed_memory
from pipeline.toy_scenes import VALUES, parse_caption
from video_dit.classifier import LatentClassifier, sample_classes
from video_dit.diffusion.guidance import GuidanceOptions, classifier_free
from video_dit.diffusion.samplers import SAMPLERS
from video_dit.generator import GenerationRequest, Generator
from video_dit.given_frames import given_latents
from video_dit.packing import PackedBatch, pack

BATCH = 16
SEED = 7
STEPS = (4, 10, 20, 50)
GUIDANCE = {
    "none": (1.0, GuidanceOptions()),
    "2": (2.0, GuidanceOptions()),
    "4": (4.0, GuidanceOptions()),
    "4, interval 0.3 to 0.8": (4.0, GuidanceOptions(interval=(0.3, 0.8))),
    "4, rescale 0.7": (4.0, GuidanceOptions(rescale=0.7)),
    "4, CFG-Zero*": (4.0, GuidanceOptions(zero_star=True, zero_above=1.0)),
    "4, APG": (4.0, GuidanceOptions(parallel=0.0, max_norm=15.0, momentum=-0.5)),
}
THRESHOLDS = (0.0, 0.05, 0.1, 0.2, 0.4)
CLASSIFIER_SCALES = (0.0, 1.0, 3.0, 10.0)

Make = Callable[[Sequence[GenerationRequest]], Sequence[Tensor]]


class Scenes:
    """Held-out scenes to make, and rendered ones to compare with."""

    def __init__(self, num: int) -> None:
        self.prompts = sorted(toy.evaluation_prompts(num, SEED), key=lambda prompt: prompt.shape)
        random = np.random.default_rng(SEED)
        self.features = [features_of([self._render(prompt, random) for prompt in self.prompts]) for _ in range(2)]

    @staticmethod
    def _render(prompt: toy.EvaluationPrompt, random: np.random.Generator) -> Tensor:
        start = toy.draw_start(prompt.scene, prompt.shape, random)
        return torch.from_numpy(toy.render(prompt.scene, *prompt.shape, start))

    def batches(self, **fields: Any) -> Iterator[list[GenerationRequest]]:
        """Requests for all scenes, with further fields."""
        requests = [
            GenerationRequest(
                prompt=prompt.caption,
                num_frames=prompt.shape.t,
                height_px=prompt.shape.h,
                width_px=prompt.shape.w,
                seed=seed,
                **fields,
            )
            for seed, prompt in enumerate(self.prompts)
        ]
        return (requests[start : start + BATCH] for start in range(0, len(requests), BATCH))

    def middle_batch(self, **fields: Any) -> list[GenerationRequest]:
        """A batch of scenes neither small nor large."""
        batches = list(self.batches(**fields))
        return batches[len(batches) // 2]

    def measure(self, label: str, make: Make, **fields: Any) -> dict[str, Any]:
        """One setting's figures; `right` tells scene by scene, 1 or 0."""
        start_s = time.perf_counter()
        videos = [video for batch in self.batches(**fields) for video in make(batch)]
        elapsed_s = time.perf_counter() - start_s
        verdicts = [
            toy_checker.score(video.numpy(), prompt.caption) for video, prompt in zip(videos, self.prompts, strict=True)
        ]
        figures = {
            "score": toy_checker.score_table(verdicts),
            "frechet": frechet_distance(features_of(videos), self.features[0]),
            "seconds": elapsed_s,
            "right": "".join(str(int(verdict["all"])) for verdict in verdicts),
        }
        right, distance = 100 * figures["score"]["all"], figures["frechet"]
        print(f"{label}: {right:.1f} %, Frechet {distance:.4f}, {elapsed_s:.0f} s", flush=True)
        return figures


def samplers(scenes: Scenes, generator: Generator) -> dict[str, Any]:
    """Every sampler in few and many steps."""
    return {
        sampler: {
            str(steps): scenes.measure(f"{sampler}, {steps} steps", generator, sampler=sampler, num_steps=steps)
            for steps in STEPS
        }
        for sampler in SAMPLERS
        if sampler != "ddim"  # on a flow, DDIM without fresh noise is Euler
    }


def guidance(scenes: Scenes, generator: Generator) -> dict[str, Any]:
    """Classifier-free guidance and its refinements, Euler, 20 steps."""
    return {
        name: scenes.measure(f"guidance {name}", generator, num_steps=20, guidance_scale=scale, guidance=options)
        for name, (scale, options) in GUIDANCE.items()
    }


def cache(scenes: Scenes, generator: Generator) -> dict[str, Any]:
    """The step cache, Euler, 50 steps: what it costs in quality, and gains in time (interleaved, in latents alone)."""
    batch = scenes.middle_batch(num_steps=50)
    found = {
        str(threshold): scenes.measure(f"cache {threshold}", generator, num_steps=50, cache_threshold=threshold)
        for threshold in THRESHOLDS
    }

    def latents(threshold: float) -> Callable[[], object]:
        requests = [
            generator.limits.complete(dataclasses.replace(request, cache_threshold=threshold)) for request in batch
        ]
        given = [given_latents(generator.vae, request) for request in requests]  # nothing
        return torch.inference_mode()(lambda: generator._sample(requests, given))

    times = interleave({str(threshold): latents(threshold) for threshold in THRESHOLDS}, rounds=5)
    for name, figures in found.items():
        figures["speed"] = ratio(times, name, "0.0")._asdict()
    return found


def student(scenes: Scenes, generator: Generator, other: Generator) -> dict[str, Any]:
    """A distilled student in few steps, beside its teacher in as many and in 50."""
    return {
        "teacher": {
            f"{steps}, guidance {scale:g}": scenes.measure(
                f"teacher, {steps} steps, guidance {scale:g}", generator, num_steps=steps, guidance_scale=scale
            )
            for steps in (1, 2, 4, 50)
            for scale in (1.0, generator.sampling.guidance_scale)
        },
        "student": {
            str(steps): scenes.measure(f"student, {steps} steps", other, num_steps=steps) for steps in (1, 2, 4)
        },
    }


def classifier(scenes: Scenes, generator: Generator, guide: LatentClassifier) -> dict[str, Any]:
    """Classifier guidance of the model that is told nothing, Euler, 20 steps, by scale."""

    def led(scale: float) -> Make:
        def make(requests: Sequence[GenerationRequest]) -> list[Tensor]:
            scenes_of = [parse_caption(request.prompt) for request in requests]
            labels = guide.config.labels([{name: getattr(scene, name) for name in VALUES} for scene in scenes_of])
            return sample_classes(generator, guide, requests, labels, scale)

        return make

    return {
        str(scale): scenes.measure(f"classifier scale {scale:g}", led(scale), num_steps=20)
        for scale in CLASSIFIER_SCALES
    }


def packed_guidance(scenes: Scenes, generator: Generator) -> dict[str, Any]:
    """Both halves of guidance in one packed forward pass against two passes and the same formula."""
    found = {}
    scene = scenes.middle_batch()
    many = [dataclasses.replace(request, height_px=64, width_px=64, num_frames=17) for request in scene]
    for name, chosen in (
        ("one scene", scene[:1]),
        ("one of 17x64x64", many[:1]),
        ("16 scenes", scene),
        ("16 of 17x64x64", many),
    ):
        requests, size = [generator.limits.complete(request) for request in chosen], len(chosen)
        texts = generator.text([request.prompt for request in requests])
        noise = [generator._noise(request) for request in requests]
        packed = pack(noise, [500.0] * size, texts, generator.dit.config.patch)
        both = generator._denoiser(requests, packed, torch.zeros_like(packed.tokens[:, :1], dtype=torch.bool))
        negative = packed.with_texts(generator.text([""] * size))
        timestep, scale = torch.tensor(500.0), both.guidance.scale

        def two_passes(packed: PackedBatch = packed, negative: PackedBatch = negative, scale: Tensor = scale) -> Tensor:
            return classifier_free(generator.dit(packed), generator.dit(negative), scale)

        one_pass = functools.partial(both, packed.tokens, timestep)
        with torch.inference_mode():
            times = interleave({"packed": one_pass, "two passes": two_passes}, rounds=30, warm_up=3)
            error = float((one_pass() - two_passes()).abs().max())
        found[name] = {**ratio(times, "packed", "two passes")._asdict(), "tokens": packed.num_tokens, "error": error}
        print(f"packed guidance, {name}: {found[name]}", flush=True)
    return found


def main() -> None:
    """Measure the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="run or folder of a model of the toy world")
    parser.add_argument("--student", help="run or folder of a student distilled from it")
    parser.add_argument("--classifier", help="run or folder of a classifier of its latents")
    parser.add_argument(
        "--blind", help="run or folder of a model that knows no captions; else the model is not told them"
    )
    parser.add_argument("--num", type=int, default=200, help="scenes of each setting")
    parser.add_argument("--parts", nargs="+", default=["packed_guidance", "samplers", "guidance", "cache"])
    options = parser.parse_args()
    keep_freed_memory()  # as workers do
    scenes, generator = Scenes(options.num), Generator.from_pretrained(model_of(options.model))
    file = RESULTS / "sampling.json"
    figures = json.loads(file.read_text()) if file.exists() else {}
    figures["scenes"], figures["frechet_of_rendered"] = options.num, frechet_distance(*scenes.features)
    parts = {part.__name__: part for part in (packed_guidance, samplers, guidance, cache)}
    for name in options.parts:
        figures[name] = parts[name](scenes, generator)
        write_result("sampling", figures)
    if options.student:
        figures["student"] = student(scenes, generator, Generator.from_pretrained(model_of(options.student)))
        write_result("sampling", figures)
    if options.classifier:
        guide = LatentClassifier.from_pretrained(model_of(options.classifier))
        blind = Generator.from_pretrained(model_of(options.blind or options.model))
        figures["classifier"] = classifier(scenes, blind, guide)
        write_result("sampling", figures)


def model_of(folder: str) -> str:
    """The model folder of a run, or the folder itself."""
    models = {int(path.name.removeprefix("step-")): path for path in Path(folder, "models").glob("step-*")}
    return str(models[max(models)] if models else folder)


if __name__ == "__main__":
    main()
