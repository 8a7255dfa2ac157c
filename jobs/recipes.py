"""Named whole configurations. A docstring tells the purpose, the cost and what to expect."""

from collections.abc import Callable
from dataclasses import replace

from pipeline.chain import Recipe
from pipeline.curate import CurateConfig
from pipeline.distill_video import DistillVideoConfig
from pipeline.encode import EncodeConfig
from pipeline.evaluate import EvaluateConfig
from pipeline.plan import PlanConfig
from pipeline.toy import ToyConfig
from pipeline.toy_scenes import VALUES
from pipeline.train import WorkersConfig
from pipeline.train_classifier import TrainClassifierConfig
from pipeline.train_vae import TrainVaeConfig
from pipeline.train_video import TrainVideoConfig
from video_dit.classifier import LatentClassifierConfig
from video_dit.diffusion.distillation import DistillationConfig
from video_dit.diffusion.losses import DiffusionConfig
from video_dit.model import VideoDiTConfig
from video_dit.text import HashedWordConfig
from video_dit.training import OptimizerConfig
from video_dit.vae import VideoVAEConfig


def toy_cpu() -> Recipe:
    """The whole system on a laptop: a world of moving shapes, from MP4 files to a model that draws them.

    On two cores a quarter of an hour; then some nine of ten held-out captions are drawn right in all attributes.
    A classifier that begins with the model takes three minutes more, a student of it that needs one step ten.
    """
    text = HashedWordConfig(dim=96, position_dim=16)
    channels = 16
    vae = VideoVAEConfig(
        base_dim=16,
        z_dim=channels,
        dim_mult=(1, 2, 2),
        num_res_blocks=1,
        temperal_downsample=(True, True),
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        latents_mean=(0.0,) * channels,
        latents_std=(1.0,) * channels,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )
    dit = VideoDiTConfig(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=channels,
        out_channels=channels,
        text_dim=text.dim,
        freq_dim=64,
        ffn_dim=512,
        num_layers=4,
    )
    guidance_scale = 2.0
    return Recipe(
        toy=ToyConfig(num_clips=3000),
        curate=CurateConfig(fps=8.0, max_frames=33, max_side_px=96, max_pixels_px=96 * 96),
        vae=TrainVaeConfig(
            vae=vae,
            text=text,
            crop_frames=17,
            image_steps=600,
            plan=PlanConfig(token_budget=60, packs_per_step=2),
            optimizer=OptimizerConfig(
                learning_rate=2e-3, matrix_learning_rate=0.02, num_steps=1600, weight_decay=0.0, ema_decay=0.98
            ),
        ),
        encode=EncodeConfig(),
        video=TrainVideoConfig(
            dit=dit,
            diffusion=DiffusionConfig(shift=3.0, condition_rate=0.25),
            plan=PlanConfig(token_budget=1024, packs_per_step=2, quadratic_tokens=2 * dit.dim + dit.ffn_dim),
            optimizer=OptimizerConfig(learning_rate=5e-3, matrix_learning_rate=0.05, num_steps=2400, ema_decay=0.995),
            guidance_scale=guidance_scale,
        ),
        classifier=TrainClassifierConfig(
            model=LatentClassifierConfig(
                classes=VALUES,
                num_attention_heads=dit.num_attention_heads,
                attention_head_dim=dit.attention_head_dim,
                in_channels=channels,
                freq_dim=dit.freq_dim,
                ffn_dim=dit.ffn_dim,
                num_layers=dit.num_layers,
            ),
            diffusion=DiffusionConfig(times="uniform"),
            plan=PlanConfig(token_budget=1024, packs_per_step=2),
            optimizer=OptimizerConfig(learning_rate=2e-3, matrix_learning_rate=0.02, num_steps=1000, ema_decay=0.99),
        ),
        distill=DistillVideoConfig(
            distillation=DistillationConfig(guidance_scale=guidance_scale, renoise_mean=-1.0, r1_weight=0.01),
            plan=PlanConfig(token_budget=1024, packs_per_step=2, quadratic_tokens=2 * dit.dim + dit.ffn_dim),
            optimizer=OptimizerConfig(learning_rate=5e-4, num_steps=1000, weight_decay=0.0, ema_decay=0.99),
            heads_learning_rate=5e-3,
        ),
        evaluate=EvaluateConfig(num_prompts=200),
        workers=WorkersConfig(num_workers=2, cpus_per_worker=1, checkpoint_every=250, show_every=1000),
    )


def smoke_cpu() -> Recipe:
    """A minute to see that every hop runs on this machine: the toy world with few clips and steps; it draws noise."""
    recipe = toy_cpu()
    return replace(
        recipe,
        toy=replace(recipe.toy, num_clips=48),
        vae=replace(
            recipe.vae,
            image_steps=6,
            optimizer=replace(recipe.vae.optimizer, num_steps=10),
            num_statistics_clips=16,
        ),
        video=replace(
            recipe.video,
            dit=replace(recipe.video.dit, num_attention_heads=2, ffn_dim=128, num_layers=2),
            optimizer=replace(recipe.video.optimizer, num_steps=20),
            num_steps=4,
        ),
        classifier=replace(
            recipe.classifier,
            model=replace(recipe.classifier.model, num_attention_heads=2, ffn_dim=128, num_layers=2),
            optimizer=replace(recipe.classifier.optimizer, num_steps=10),
        ),
        distill=replace(recipe.distill, optimizer=replace(recipe.distill.optimizer, num_steps=10)),
        sample=replace(recipe.sample, num=4),
        evaluate=replace(recipe.evaluate, num_prompts=8),
        workers=replace(recipe.workers, num_workers=1, cpus_per_worker=1, checkpoint_every=5, show_every=10),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"smoke_cpu": smoke_cpu, "toy_cpu": toy_cpu}
