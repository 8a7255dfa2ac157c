"""The video diffusion transformer: Wan 2.1 / 2.2's architecture, on packed sequences of mixed shapes.

Differences from DiT (arXiv 2212.09748): text by cross-attention, 3-D rotary positions, one time projection shared
by all blocks plus a learned table in each, and a timestep for every frame.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor, nn

from video_dit import weights
from video_dit.attention import Segments, attention_backend
from video_dit.layers import (
    CrossAttention,
    ImageEmbedding,
    Modulation,
    PatchEmbedding,
    SelfAttention,
    TextKeys,
    gated,
    modulate,
    per_group,
    timestep_embedding,
)
from video_dit.model_config import VideoDiTConfig
from video_dit.muon import Matrix
from video_dit.packing import PackedBatch
from video_dit.rope import rotations

if TYPE_CHECKING:
    from video_dit.step_cache import StepCache

__all__ = ["VideoDiT", "VideoDiTConfig"]


class Block(nn.Module):
    """Self-attention, cross-attention to text and images (ungated), MLP; first and last modulated by the timestep."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        dim, heads, eps = config.dim, config.num_attention_heads, config.eps
        self.eps = eps
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.self_attention = SelfAttention(dim, heads, eps)
        self.norm_cross = nn.LayerNorm(dim, eps=eps) if config.cross_attn_norm else nn.Identity()
        self.cross_attention = CrossAttention(dim, heads, eps, sees_images=config.image_dim is not None)
        self.mlp = nn.Sequential(nn.Linear(dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, dim))

    def forward(
        self,
        x: Tensor,
        text: Tensor | TextKeys,
        time: Tensor,
        frame_of_token: Tensor | None,
        rotation: Tensor,
        self_segments: Segments,
        cross_segments: Segments,
        images: Tensor | None = None,
        image_segments: Segments | None = None,
    ) -> Tensor:
        """x n d, text s d, time f 6 d (float32), frame_of_token n, rotation n e/2 2, perhaps images m d -> n d."""
        table = per_group(self.modulation.float() + time, frame_of_token).unbind(1)  # six of g d
        attention, mlp = Modulation(*table[:3]), Modulation(*table[3:])
        y = modulate(x, attention.shift, attention.scale, self.eps)
        x = gated(x, self.self_attention(y, rotation, self_segments), attention.gate)
        x = x + self.cross_attention(self.norm_cross(x), text, cross_segments, images, image_segments)
        y = modulate(x, mlp.shift, mlp.scale, self.eps)
        return gated(x, self.mlp(y), mlp.gate)


class Head(nn.Module):
    """Last norm, modulated by the timestep, and the projection back to patches."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.channels = config.out_channels
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)
        pt, ph, pw = config.patch
        self.out = nn.Linear(config.dim, pt * ph * pw * config.out_channels)

    def forward(self, x: Tensor, time: Tensor, frame_of_token: Tensor | None) -> Tensor:
        """x n d, time f d -> n (c pt ph pw)."""
        shift, scale = per_group(self.modulation.float() + time[:, None], frame_of_token).unbind(1)  # g d each
        patches = self.out(modulate(x, shift, scale, self.eps))  # n (pt ph pw c)
        return rearrange(patches, "n (p c) -> n (c p)", c=self.channels)


class VideoDiT(nn.Module):
    """Predicts a denoising target for every token of a pack; samples never see each other."""

    published_class = "WanTransformer3DModel"
    float32_modules = ("time_mlp", "time_modulation")  # stay float32 when the rest is trained in bfloat16

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = PatchEmbedding(config.in_channels, config.patch, dim)
        self.time_mlp = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_modulation = nn.Linear(dim, 6 * dim)
        self.text_mlp = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.image_embedding = (
            None if config.image_dim is None else ImageEmbedding(config.image_dim, dim, config.pos_embed_seq_len)
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.startswith(("time_mlp", "text_mlp")) and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
        nn.init.zeros_(self.head.out.weight)  # the first prediction is zero

    def forward(
        self, packed: PackedBatch, cache: StepCache | None = None, text_keys: Sequence[TextKeys] | None = None
    ) -> Tensor:
        """Predict the target of every token.

        Args:
            packed: tokens n (c pt ph pw).
            cache: of the step before, when sampling.
            text_keys: of the pack's texts, when sampling; None computes them.

        Returns:
            n (c pt ph pw), in the layout of `packed.tokens` and the weights' dtype; `packed.unpack` gives latents.

        Raises:
            ValueError: a pack without the images that this model needs, or with images that it cannot take.
        """
        time = self.embed_time(packed)  # f d
        x = self.patch_embedding(packed.tokens.to(self.patch_embedding.weight.dtype))  # n d
        run_blocks = self.run_blocks if cache is None else functools.partial(cache.run_blocks, self)
        x = run_blocks(x, packed, time, text_keys=text_keys)
        return self.head(x, time, None if packed.has_equal_frames else packed.frame_of_token)  # n (c pt ph pw)

    def embed_time(self, packed: PackedBatch) -> Tensor:
        """The pack's timesteps at the model's width, f d, float32."""
        embedding = timestep_embedding(packed.timesteps, self.config.freq_dim)  # f freq
        time: Tensor = self.time_mlp(embedding.to(next(self.time_mlp.parameters()).dtype))
        return time.float()

    def text_keys(self, packed: PackedBatch) -> list[TextKeys]:
        """What each block makes of the pack's texts: the same in every step of a sampling. Not under FSDP."""
        text = self._embed_texts(packed)
        return [layer.text_keys(text) for layer in self.blocks.modules() if isinstance(layer, CrossAttention)]

    def run_blocks(
        self,
        x: Tensor,
        packed: PackedBatch,
        time: Tensor,
        blocks: slice | None = None,
        text_keys: Sequence[TextKeys] | None = None,
    ) -> Tensor:
        """All of the blocks or some: x n d and time f d to n d; `text_keys` of all blocks, None computes them."""
        time_dtype = next(self.time_mlp.parameters()).dtype
        shared = rearrange(
            self.time_modulation(nn.functional.silu(time).to(time_dtype)).float(), "f (k d) -> f k d", k=6
        )
        texts: Sequence[Tensor | TextKeys] = text_keys or [self._embed_texts(packed)] * len(self.blocks)
        images = self._embed_images(packed)  # m d
        rotation = self._rotation(packed)  # n e/2 2
        frame_of_token = None if packed.has_equal_frames else packed.frame_of_token
        segments = packed.self_segments, packed.cross_segments
        chosen = blocks or slice(None)
        for block, text in zip(self.blocks[chosen], texts[chosen], strict=True):
            x = block(x, text, shared, frame_of_token, rotation, *segments, images, packed.image_segments)
        return x

    def use_attention(self, name: str) -> None:
        """Compute attention with a backend of `attention.py`. Before context parallelism, which wraps the backend.

        Raises:
            ValueError: the name is unknown, or what the backend needs is not installed.
        """
        backend = attention_backend(name)
        for module in self.modules():
            if isinstance(module, SelfAttention | CrossAttention):
                module.attend = backend

    def hidden_matrices(self) -> list[Matrix]:
        """The blocks' linear maps: what Muon may train."""
        fused = {"qkv": 3, "kv": 2, "image_kv": 2}
        return [
            Matrix(module.get_parameter("weight"), fused.get(name.rsplit(".", 1)[-1], 1))
            for name, module in self.blocks.named_modules()
            if isinstance(module, nn.Linear)
        ]

    def _embed_texts(self, packed: PackedBatch) -> Tensor:
        """The pack's texts at the model's width, s d."""
        return self.text_mlp(packed.text.to(self.patch_embedding.weight.dtype))

    def _embed_images(self, packed: PackedBatch) -> Tensor | None:
        """The pack's images at the model's width, m d; None for a model without."""
        if self.image_embedding is None:
            if packed.images is not None:
                raise ValueError("the pack holds images, but this model has no image_dim")
            return None
        image_dim, num_positions = self.config.image_dim, self.config.pos_embed_seq_len
        if packed.images is None or packed.images.shape[1] != image_dim:
            found = "none" if packed.images is None else f"vectors of {packed.images.shape[1]}"
            raise ValueError(f"image_dim={image_dim}: pack(images=...) must hold vectors of that width, it has {found}")
        if num_positions is not None and set(packed.image_lengths) != {num_positions}:
            raise ValueError(f"pos_embed_seq_len={num_positions}: samples have {packed.image_lengths} image tokens")
        return self.image_embedding(packed.images.to(self.patch_embedding.weight.dtype))

    def _rotation(self, packed: PackedBatch) -> Tensor:
        width, device = self.config.attention_head_dim, packed.tokens.device
        whole = torch.cat([rotations(grid, width, device) for grid in packed.grids])
        return whole[packed.places]  # n e/2 2

    @classmethod
    def from_pretrained(cls, url: str, subfolder: str = "transformer", dtype: torch.dtype | None = None) -> VideoDiT:
        """Load a model folder; see `weights.load_model` for the errors. `dtype` None keeps the weights' own."""
        return weights.load_model(cls, VideoDiTConfig, url, subfolder, dtype)

    def save_pretrained(self, url: str, subfolder: str = "transformer") -> None:
        """Write a model folder that diffusers reads."""
        weights.save_model(self, url, subfolder)
