"""A model folder with random weights, a few thousand of them, and requests that it can make."""

import torch

from video_dit.diffusion.schedules import RectifiedFlow
from video_dit.generator import GenerationRequest, SamplingConfig, save_pipeline_parts
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.text import HashedWordConfig, HashedWordEncoder
from video_dit.vae import VideoVAE, VideoVAEConfig


def save_random_pipeline(folder, fps=8.0, **sampling):
    """Write the folder; strides are 4, 16 and 16."""
    torch.manual_seed(0)
    text = HashedWordEncoder(HashedWordConfig(dim=24, position_dim=8))
    vae = VideoVAE(
        VideoVAEConfig(
            base_dim=4,
            z_dim=4,
            dim_mult=(1, 2, 2),
            num_res_blocks=1,
            temperal_downsample=(True, True),
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            latents_mean=(0.0,) * 4,
            latents_std=(1.0,) * 4,
            scale_factor_temporal=4,
            scale_factor_spatial=8,
        )
    )
    dit = VideoDiT(
        VideoDiTConfig(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=24,
            freq_dim=16,
            ffn_dim=48,
            num_layers=2,
        )
    )
    torch.nn.init.normal_(dit.head.out.weight, std=0.5)
    vae.save_pretrained(str(folder))
    dit.save_pretrained(str(folder))
    save_pipeline_parts(str(folder), text, SamplingConfig(fps=fps, **{"schedule": RectifiedFlow(), **sampling}))


def request(seed=0, **changes):
    fields = {"prompt": "a red circle", "height_px": 32, "width_px": 48, "num_frames": 5, "num_steps": 3}
    return GenerationRequest(**{**fields, "seed": seed, **changes})


def noise_u8(num_frames, seed=0, height_px=32, width_px=48):
    """Frames to give, t h w 3."""
    return torch.randint(
        256, (num_frames, height_px, width_px, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
