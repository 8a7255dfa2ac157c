"""Prompt to video: the one path that evaluation, batch generation and serving share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from video_dit import weights
from video_dit.diffusion.guidance import classifier_free
from video_dit.diffusion.sampling import Denoise, sample
from video_dit.diffusion.schedules import RectifiedFlow
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.packing import PackedBatch, concatenate, pack
from video_dit.random import keyed_normal
from video_dit.shapes import Stride, VideoShape
from video_dit.text import TextEncoder, load_text_encoder
from video_dit.vae import VideoVAE, VideoVAEConfig, split_latents

OnStep = Callable[[int, int], None]
Guide = Callable[[Denoise, PackedBatch], Denoise]


DECODED_PIXELS = 1 << 20  # of a video, at a time: some gigabytes of activations


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One video to make.

    Attributes:
        prompt: what it shows.
        height_px, width_px: sides, multiples of the model's stride.
        num_frames: 1 (an image) or 1 + a multiple of the model's temporal stride.
        num_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 is none.
        negative_prompt: what guidance leads away from; empty is the unconditional model.
        seed: the same request with the same seed gives the same video.
    """

    prompt: str
    height_px: int
    width_px: int
    num_frames: int
    num_steps: int = 20
    guidance_scale: float = 4.0
    negative_prompt: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps}: must be at least 1")
        if not 0 <= self.guidance_scale <= 100:
            raise ValueError(f"guidance_scale={self.guidance_scale}: must be between 0 and 100; 1 is no guidance")

    @property
    def shape(self) -> VideoShape:
        """The video in pixels."""
        return VideoShape(self.num_frames, self.height_px, self.width_px)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a model can make.

    Attributes:
        stride: frames, rows and columns that one token covers: sides are multiples, frames 1 + a multiple.
        fps: frames per second of the clips it was trained on.
    """

    stride: Stride
    fps: float

    def check(self, request: GenerationRequest) -> None:
        """Raise ValueError, naming field, value and fix, if the model cannot make this."""
        request.shape.latent(self.stride)


def read_limits(url: str) -> Limits:
    """The limits of a model folder, without loading its weights.

    Raises:
        ValueError: a model that cannot be sampled from yet.
    """
    _check_one_transformer(url)
    dit: VideoDiTConfig = weights.read_config(VideoDiTConfig, url, "transformer")
    vae: VideoVAEConfig = weights.read_config(VideoVAEConfig, url, "vae")
    return _limits(dit, vae, _read_sampling(url)["fps"])


def _check_one_transformer(url: str) -> None:
    index = json.loads(weights.read_bytes(url, "model_index.json"))
    if any(index.get("transformer_2") or ()):
        raise ValueError(
            f"{url}: transformer_2 in model_index.json: pairs of experts (Wan 2.2 A14B) cannot be sampled from yet; "
            "each loads on its own by VideoDiT.from_pretrained(..., subfolder='transformer_2')"
        )


def _limits(dit: VideoDiTConfig, vae: VideoVAEConfig, fps: float) -> Limits:
    if dit.in_channels != vae.z_dim or dit.image_dim is not None:
        raise ValueError(
            f"in_channels={dit.in_channels}, image_dim={dit.image_dim}: must be the VAE's z_dim={vae.z_dim} and None; "
            "a transformer that takes images besides noise is driven from Python, no request can give them yet"
        )
    return Limits(
        stride=Stride(vae.stride.t * dit.patch.t, vae.stride.h * dit.patch.h, vae.stride.w * dit.patch.w), fps=fps
    )


def _read_sampling(url: str) -> dict[str, float]:
    values = json.loads(weights.read_bytes(url, "scheduler", "scheduler_config.json"))
    shift = values.get("shift", values.get("flow_shift", 1.0))  # diffusers' Euler and UniPC schedulers
    return {"shift": float(shift), "fps": float(values.get("fps", 16.0))}


class Generator:
    """A model folder, ready to make videos of any supported sizes in one packed batch."""

    def __init__(self, dit: VideoDiT, vae: VideoVAE, text: TextEncoder, schedule: RectifiedFlow, fps: float) -> None:
        self.dit, self.vae, self.text, self.schedule = dit.eval(), vae.eval(), text, schedule
        self.limits = _limits(dit.config, vae.config, fps)

    @classmethod
    def from_pretrained(cls, url: str, device: str | torch.device = "cpu") -> Generator:
        """Load a model folder (any fsspec URL).

        Raises:
            ValueError: a model that cannot be sampled from yet.
        """
        _check_one_transformer(url)
        sampling = _read_sampling(url)
        dit = VideoDiT.from_pretrained(url).to(device)
        vae = VideoVAE.from_pretrained(url).to(device)
        text = load_text_encoder(url, device=device)
        return cls(dit, vae, text, RectifiedFlow(shift=sampling["shift"]), sampling["fps"])

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
            requests: sizes and prompts may differ; num_steps may not.
            on_step: called with (done, total) after each denoising step; what it raises cancels the call.
            guide: (denoise, the pack) -> another denoise function, as for `sample`.

        Returns:
            uint8 t h w 3 RGB on the CPU, one a request.

        Raises:
            ValueError: a request the model cannot make, or requests of different num_steps.
        """
        for request in requests:
            self.check(request)
        if len({request.num_steps for request in requests}) != 1:
            raise ValueError("requests of one batch need the same num_steps")
        packed = self._pack(requests)
        negative = self.text([request.negative_prompt for request in requests])
        denoise: Denoise = _GuidedDenoiser(self.dit, packed, negative, [request.guidance_scale for request in requests])
        if guide:
            denoise = guide(denoise, packed)
        tokens = sample(
            denoise, packed.tokens, schedule=self.schedule, num_steps=requests[0].num_steps, on_step=on_step
        )
        return [self._decode(latents) for latents in packed.unpack(tokens)]

    def _pack(self, requests: Sequence[GenerationRequest]) -> PackedBatch:
        device = next(self.dit.parameters()).device
        channels = self.dit.config.in_channels
        noise = [
            keyed_normal((channels, *request.shape.latent(self.vae.config.stride)), "generate", request.seed)
            for request in requests
        ]
        texts = self.text([request.prompt for request in requests])
        return pack(noise, [1000.0] * len(noise), texts, self.dit.config.patch).to(device)

    def _decode(self, latents: Tensor) -> Tensor:
        chunks = split_latents(latents[None], self.vae.config.stride, DECODED_PIXELS)
        return torch.cat([video_to_u8(video[0]) for video in self.vae.decode_stream(chunks)])  # t h w 3


class _GuidedDenoiser:
    """The model under classifier-free guidance: both halves in one packed forward, a scale for each sample."""

    def __init__(self, dit: VideoDiT, packed: PackedBatch, negative: Sequence[Tensor], scales: Sequence[float]) -> None:
        self.dit = dit
        self.guided = any(scale != 1 for scale in scales)
        self.packed = concatenate(packed, packed.with_texts(negative)) if self.guided else packed
        lengths = torch.tensor([grid.num_tokens for grid in packed.grids])
        in_order = torch.tensor([scales[place] for place in packed.order])
        self.scale = in_order.repeat_interleave(lengths)[:, None].to(packed.tokens.device)  # n 1

    def __call__(self, tokens: Tensor, timestep: Tensor) -> Tensor:
        timesteps = torch.full_like(self.packed.timesteps, float(timestep))
        if not self.guided:
            return self.dit(self.packed.replace(tokens=tokens, timesteps=timesteps))
        both = self.packed.replace(tokens=torch.cat([tokens, tokens]), timesteps=timesteps)
        conditional, unconditional = self.dit(both).chunk(2)
        return classifier_free(conditional, unconditional, self.scale)


def video_to_u8(video: Tensor) -> Tensor:
    """3 t h w in [-1, 1] -> t h w 3 uint8 on the CPU; rounded on the device, so that a quarter of the bytes move."""
    u8 = video.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return rearrange(u8, "c t h w -> t h w c").cpu().contiguous()


def save_pipeline_parts(
    url: str, text: TextEncoder | None, shift: float, fps: float, models: Sequence[str] = ("transformer", "vae")
) -> None:
    """Write what a model folder holds beside `transformer/` and `vae/`.

    Args:
        url: the model folder.
        text: the text encoder the transformer was trained with; None where it comes later.
        shift: of the sampling schedule.
        fps: frames per second of the training clips.
        models: which of the two are there.
    """
    if text is not None:
        text.save_pretrained(url)
    scheduler = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": shift,
        "fps": fps,
    }
    weights.write_bytes((json.dumps(scheduler, indent=2) + "\n").encode(), url, "scheduler", "scheduler_config.json")
    classes = {"transformer": VideoDiT.published_class, "vae": VideoVAE.published_class}
    weights.save_index(
        url,
        [
            *((name, "diffusers", classes[name]) for name in models),
            *(() if text is None else text.index_rows),
            ("scheduler", "diffusers", "FlowMatchEulerDiscreteScheduler"),
        ],
    )
