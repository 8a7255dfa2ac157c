"""Sizes of the video diffusion transformer."""

from __future__ import annotations

import dataclasses

from video_dit.shapes import Stride


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoDiTConfig:
    """Sizes of a transformer, under the names of diffusers' WanTransformer3DModel.

    Attributes:
        patch_size: latent frames, rows and columns in one token.
        num_attention_heads, attention_head_dim: width d is their product.
        in_channels: channels of the latents, and of a condition behind them where there is one (Wan's 36).
        out_channels: channels of the prediction.
        text_dim: width of the text encoder's vectors.
        freq_dim: width of the sinusoidal timestep embedding.
        ffn_dim: hidden width of the MLP.
        num_layers: blocks.
        cross_attn_norm: whether cross-attention has a norm with weights in front.
        qk_norm: only "rms_norm_across_heads".
        eps: of all norms.
        image_dim: width of CLIP's vectors of the images that condition a sample (Wan 2.1's I2V); None for no images.
        added_kv_proj_dim: width of the image tokens in cross-attention: d where there is an image_dim.
        pos_embed_seq_len: image tokens of every sample, where each has a learned position (first and last frame).
        rope_max_seq_len: kept for the published configs; positions are computed for any length.
    """

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 12
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 8960
    num_layers: int = 30
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None

    def __post_init__(self) -> None:
        if self.attention_head_dim % 2 or self.attention_head_dim < 6:
            raise ValueError(
                f"attention_head_dim={self.attention_head_dim}: must be even and at least 6 (pairs for t, h and w)"
            )
        if self.qk_norm != "rms_norm_across_heads":
            raise ValueError(f"qk_norm={self.qk_norm!r}: only 'rms_norm_across_heads'")
        for name in (
            *("in_channels", "out_channels", "text_dim", "freq_dim", "ffn_dim", "num_layers"),
            *("image_dim", "pos_embed_seq_len"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        width = None if self.image_dim is None else self.dim
        if self.added_kv_proj_dim != width:
            raise ValueError(
                f"added_kv_proj_dim={self.added_kv_proj_dim}: must be {width} with image_dim={self.image_dim}"
            )
        if self.pos_embed_seq_len is not None and self.image_dim is None:
            raise ValueError(f"pos_embed_seq_len={self.pos_embed_seq_len}: must be None without an image_dim")

    @property
    def dim(self) -> int:
        """Model width d."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch(self) -> Stride:
        """The patch as a stride."""
        return Stride(*self.patch_size)
