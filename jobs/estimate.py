"""What a training run of the transformer will need: memory of each GPU, hours, disk. Nothing is downloaded or started.

python jobs/estimate.py toy_cpu --gpu H200 --num-gpus 8 --num-frames 81 --height-px 480 --width-px 832 \\
    --video.start models/wan --video.plan.token-budget 32760 --video.precision bf16 --checkpointing selective
"""

import dataclasses
import sys

import tyro

from jobs import cli
from jobs.recipes import RECIPES
from pipeline import console
from pipeline.estimate import estimate
from pipeline.train_video import TrainVideoConfig
from video_dit import weights
from video_dit.flops import PEAK_FLOPS
from video_dit.model import VideoDiTConfig
from video_dit.parallel.activation_checkpointing import Checkpointing
from video_dit.shapes import VideoShape
from video_dit.vae import VideoVAEConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of the job.

    Attributes:
        video: the training run, of the recipe that is named first.
        vae: sizes of the VAE, for its strides; of `video.start` where that is given.
        gpu: see `--help` of the job for those that are known.
        num_gpus: that share the run.
        num_frames, height_px, width_px: of a typical clip.
        checkpointing: of activations.
        utilisation: share of the GPU's peak that steps reach; 0.33 is the best that was published for such models.
    """

    video: TrainVideoConfig
    vae: VideoVAEConfig
    gpu: str = "H200"
    num_gpus: int = 8
    num_frames: int = 33
    height_px: int = 64
    width_px: int = 64
    checkpointing: Checkpointing = "none"
    utilisation: float = 0.3


def job(options: Options) -> None:
    """Print the card."""
    video, vae = options.video, options.vae
    if video.start is not None:
        vae = weights.read_config(VideoVAEConfig, video.start, "vae")
        video = dataclasses.replace(video, dit=weights.read_config(VideoDiTConfig, video.start, "transformer"))
    clip = VideoShape(options.num_frames, options.height_px, options.width_px).latent(vae.stride)
    found = estimate(
        video,
        num_gpus=options.num_gpus,
        gpu=options.gpu,
        clip=clip,
        checkpointing=options.checkpointing,
        utilisation=options.utilisation,
    )
    console.estimate_card(found, options.num_gpus, options.gpu, options.utilisation)


if __name__ == "__main__":
    name, rest = cli.recipe_name(sys.argv[1:])
    recipe = RECIPES[name]()
    about = f"{__doc__}\nRecipes: {', '.join(RECIPES)}. GPUs whose speed is known: {', '.join(PEAK_FLOPS)}."
    default = Options(video=recipe.video, vae=recipe.vae.vae)
    with cli.errors_in_one_line():
        job(tyro.cli(Options, default=default, args=rest, description=about))
