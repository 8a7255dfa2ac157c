"""Prompt to video: the one path that evaluation, batch generation and serving share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from video_dit import weights
from video_dit.denoiser import GuidedDenoiser
from video_dit.diffusion.guidance import Guidance
from video_dit.diffusion.held import hold
from video_dit.diffusion.sampling import Denoise, sample
from video_dit.given_frames import Given, encode_frames, given_latents, has_lone_frames, put_back
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.packing import PackedBatch, pack, patchify
from video_dit.random import keyed_normal
from video_dit.requests import GenerationRequest, Limits
from video_dit.scheduler_files import SamplingConfig, read_scheduler, write_scheduler
from video_dit.shapes import Stride
from video_dit.text import TextEncoder, load_text_encoder
from video_dit.vae import VideoVAE, VideoVAEConfig, split_latents

__all__ = [
    "GenerationRequest",
    "Generator",
    "Limits",
    "SamplingConfig",
    "read_limits",
    "save_pipeline_parts",
    "video_to_u8",
]

OnStep = Callable[[int, int], None]
Guide = Callable[[Denoise, PackedBatch], Denoise]
DECODED_PIXELS = 1 << 20  # of a video, at a time: some gigabytes of activations


def read_limits(url: str) -> Limits:
    """The limits of a model folder, without loading its weights.

    Raises:
        ValueError: a model that cannot be sampled from yet.
    """
    _check_one_transformer(url)
    dit: VideoDiTConfig = weights.read_config(VideoDiTConfig, url, "transformer")
    vae: VideoVAEConfig = weights.read_config(VideoVAEConfig, url, "vae")
    return _limits(dit, vae, read_scheduler(url))


def _check_one_transformer(url: str) -> None:
    index = json.loads(weights.read_bytes(url, "model_index.json"))
    if any(index.get("transformer_2") or ()):
        raise ValueError(
            f"{url}: transformer_2 in model_index.json: pairs of experts (Wan 2.2 A14B) cannot be sampled from yet; "
            "each loads on its own by VideoDiT.from_pretrained(..., subfolder='transformer_2')"
        )


def _limits(dit: VideoDiTConfig, vae: VideoVAEConfig, sampling: SamplingConfig) -> Limits:
    if dit.in_channels != vae.z_dim or dit.image_dim is not None:
        raise ValueError(
            f"in_channels={dit.in_channels}, image_dim={dit.image_dim}: must be the VAE's z_dim={vae.z_dim} and None; "
            "a transformer that takes images besides noise is driven from Python, no request can give them yet"
        )
    return Limits(
        stride=Stride(vae.stride.t * dit.patch.t, vae.stride.h * dit.patch.h, vae.stride.w * dit.patch.w),
        fps=sampling.fps,
        num_steps=sampling.num_steps,
        guidance_scale=sampling.guidance_scale,
    )


class Generator:
    """A model folder, ready to make videos of any supported sizes in one packed batch."""

    def __init__(self, dit: VideoDiT, vae: VideoVAE, text: TextEncoder, sampling: SamplingConfig) -> None:
        self.dit, self.vae, self.text, self.sampling = dit.eval(), vae.eval(), text, sampling
        self.limits = _limits(dit.config, vae.config, sampling)

    @classmethod
    def from_pretrained(cls, url: str, device: str | torch.device = "cpu") -> Generator:
        """Load a model folder (any fsspec URL).

        Raises:
            ValueError: a model that cannot be sampled from yet.
        """
        _check_one_transformer(url)
        sampling = read_scheduler(url)
        dit = VideoDiT.from_pretrained(url).to(device)
        vae = VideoVAE.from_pretrained(url).to(device)
        return cls(dit, vae, load_text_encoder(url, device=device), sampling)

    @property
    def fps(self) -> float:
        """Frames per second of the videos."""
        return self.limits.fps

    @property
    def stride(self) -> Stride:
        """Frames, rows and columns that one token covers."""
        return self.limits.stride

    def check(self, request: GenerationRequest) -> None:
        """Raise ValueError, naming field, value and fix, if the model cannot make this."""
        self.limits.check(request)

    @torch.inference_mode()
    def __call__(
        self, requests: Sequence[GenerationRequest], on_step: OnStep | None = None, guide: Guide | None = None
    ) -> list[Tensor]:
        """Make the videos, all in one packed batch.

        Args:
            requests: anything may differ but num_steps and sampler.
            on_step: called with (done, total) after each denoising step; what it raises cancels the call. Where a last
                frame is given alone, there are twice as many: the frames beside it are made before it is.
            guide: (denoise, the pack) -> another denoise function, as for `sample`.

        Returns:
            uint8 t h w 3 RGB on the CPU, one a request; frames that it gave are in it, exactly.

        Raises:
            ValueError: a request the model cannot make, or requests of different num_steps or samplers.
        """
        requests = [self.limits.complete(request) for request in requests]
        for name in ("num_steps", "sampler"):
            if len({getattr(request, name) for request in requests}) != 1:
                raise ValueError(f"requests of one batch need the same {name}")
        sampled = [request.sampled(self.stride.t) for request in requests]
        lone = [place for place, request in enumerate(sampled) if has_lone_frames(request, self.vae.config.stride.t)]
        rounds = 2 if lone else 1
        videos = self._make(sampled, [None] * len(sampled), count_on(on_step, 0, rounds), guide)
        if lone:
            again = lone if guide is None else range(len(sampled))  # a guide is for all of them
            firsts = [videos[place] for place in again]
            remade = self._make([sampled[place] for place in again], firsts, count_on(on_step, 1, rounds), guide)
            for place, video in zip(again, remade, strict=True):
                videos[place] = video if place in lone else videos[place]
        return [video[: request.num_frames] for video, request in zip(videos, requests, strict=True)]

    def _make(
        self,
        requests: Sequence[GenerationRequest],
        made: Sequence[Tensor | None],
        on_step: OnStep | None,
        guide: Guide | None,
    ) -> list[Tensor]:
        """Videos with the frames that were given; `made` are those of a first round, see `given_latents`."""
        given = [given_latents(self.vae, request, video) for request, video in zip(requests, made, strict=True)]
        latents = self._sample(requests, given, on_step, guide)
        return [
            put_back(self._decode(sample), request.conditions)
            for sample, request in zip(latents, requests, strict=True)
        ]

    def _sample(
        self,
        requests: Sequence[GenerationRequest],
        given: Sequence[Given],
        on_step: OnStep | None = None,
        guide: Guide | None = None,
    ) -> list[Tensor]:
        """Latents c t h w of each request."""
        sigmas = [self._sigmas(request) for request in requests]  # levels
        starts = [self._start(request, levels[0]) for request, levels in zip(requests, sigmas, strict=True)]
        texts = self.text([request.prompt for request in requests])
        packed = pack(starts, [1000.0] * len(starts), texts, self.dit.config.patch).to(self._device)
        clean = _to_tokens(packed, [latents for latents, _ in given])  # n (c pt ph pw)
        held_to = _to_tokens(packed, [held_to for _, held_to in given]).amax(dim=1, keepdim=True)  # n 1
        denoise: Denoise = self._denoiser(requests, packed, held_to.isfinite())
        if guide:
            denoise = guide(denoise, packed)
        tokens = sample(
            hold(denoise, held_to, clean, self.sampling.schedule, self.sampling.target),
            packed.tokens,
            schedule=self.sampling.schedule,
            target=self.sampling.target,
            sampler=requests[0].sampler,
            sigmas=packed.per_token(torch.stack(sigmas)).T[..., None],
            draw_noise=lambda step: _to_tokens(packed, [self._noise(request, step) for request in requests]),
            on_step=on_step,
        )
        return packed.unpack(torch.where(held_to == 0, clean, tokens))

    def _denoiser(self, requests: Sequence[GenerationRequest], packed: PackedBatch, is_given: Tensor) -> GuidedDenoiser:
        in_order = [requests[place] for place in packed.order]
        guidance = Guidance(
            [request.guidance_scale or 0.0 for request in in_order],  # complete requests have one
            [request.guidance for request in in_order],
            packed.lengths,
            self.sampling.target,
            self._device,
        )
        negative = self.text([request.negative_prompt for request in requests])
        thresholds = [request.cache_threshold for request in in_order]
        return GuidedDenoiser(self.dit, packed, negative, guidance, self.sampling.schedule, is_given, thresholds)

    def _sigmas(self, request: GenerationRequest) -> Tensor:
        """The noise levels that a request's video goes through, num_steps + 1, float64."""
        num_tokens = request.shape.latent(self.vae.config.stride).grid(self.dit.config.patch).num_tokens
        schedule = self.sampling.schedule.of_size(num_tokens)
        assert request.num_steps is not None  # it is complete
        return schedule.sigmas(request.num_steps, start=request.edit.sigma if request.edit else 1.0)

    def _start(self, request: GenerationRequest, sigma: Tensor) -> Tensor:
        """What sampling starts from, c t h w: noise, or the video to edit with noise in it."""
        noise = self._noise(request)
        if request.edit is None:
            return noise
        return self.sampling.schedule.mix(encode_frames(self.vae, request.edit.frames), noise, sigma)

    def _noise(self, request: GenerationRequest, *step: int) -> Tensor:
        """c t h w; the same for a seed and a step, whatever else is made."""
        shape = (self.dit.config.in_channels, *request.shape.latent(self.vae.config.stride))
        return keyed_normal(shape, "generate", request.seed, *step).to(self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.dit.parameters()).device

    def _decode(self, latents: Tensor) -> Tensor:
        chunks = split_latents(latents[None], self.vae.config.stride, DECODED_PIXELS)
        return torch.cat([video_to_u8(video[0]) for video in self.vae.decode_stream(chunks)])  # t h w 3


def count_on(on_step: OnStep | None, number: int, rounds: int) -> OnStep | None:
    """`on_step` for one of some rounds, which are one to it."""
    if on_step is None:
        return None
    return lambda done, total: on_step(number * total + done, rounds * total)


def _to_tokens(packed: PackedBatch, samples: Sequence[Tensor]) -> Tensor:
    """c t h w of each sample, in the order of the list given to `pack`, to n (c pt ph pw)."""
    return torch.cat([patchify(samples[place], packed.patch) for place in packed.order])


def video_to_u8(video: Tensor) -> Tensor:
    """3 t h w in [-1, 1] -> t h w 3 uint8 on the CPU; rounded on the device, so that a quarter of the bytes move."""
    u8 = video.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return rearrange(u8, "c t h w -> t h w c").cpu().contiguous()


def save_pipeline_parts(
    url: str, text: TextEncoder | None, sampling: SamplingConfig, models: Sequence[str] = ("transformer", "vae")
) -> None:
    """Write what a model folder holds beside `transformer/` and `vae/`.

    Args:
        url: the model folder.
        text: the text encoder the transformer was trained with; None where it comes later.
        sampling: schedule and target of the training, frames per second of its clips.
        models: which of the two are there.
    """
    if text is not None:
        text.save_pretrained(url)
    classes = {"transformer": VideoDiT.published_class, "vae": VideoVAE.published_class}
    weights.save_index(
        url,
        [
            *((name, "diffusers", classes[name]) for name in models),
            *(() if text is None else text.index_rows),
            ("scheduler", "diffusers", write_scheduler(url, sampling)),
        ],
    )
