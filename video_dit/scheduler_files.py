"""`scheduler/scheduler_config.json` of a model folder: the schedule and the target that its transformer was trained on.

The file is diffusers' own, so that its schedulers load ours and ours are read from published folders:

    RectifiedFlow, velocity     FlowMatchEulerDiscreteScheduler: shift
    RectifiedFlow, others       UniPCMultistepScheduler: use_flow_sigmas, flow_shift, prediction_type
    BetaSchedule                DDIMScheduler: beta_schedule, betas, rescale_betas_zero_snr, prediction_type

Four keys are ours, and diffusers passes over them: `fps`, `num_inference_steps` and `guidance_scale`, and `base_tokens`
of a flow whose shift depends on the size.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from video_dit import weights
from video_dit.diffusion.losses import BetaScheduleClass
from video_dit.diffusion.schedules import (
    BetaSchedule,
    CosineSchedule,
    LinearBetaSchedule,
    RectifiedFlow,
    ScaledLinearSchedule,
    Schedule,
)
from video_dit.diffusion.targets import Target

FILE = ("scheduler", "scheduler_config.json")
PREDICTION_TYPES: dict[Target, str] = {
    "noise": "epsilon",
    "data": "sample",
    "v": "v_prediction",
    "velocity": "flow_prediction",
}
DEFAULT_BETAS = {"beta_start": 1e-4, "beta_end": 0.02}  # of every scheduler of diffusers, where a file has none
PUBLISHED_SCHEDULES: dict[str, BetaScheduleClass] = {
    "linear": LinearBetaSchedule,
    "scaled_linear": ScaledLinearSchedule,
    "squaredcos_cap_v2": CosineSchedule,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """What sampling must know of a training, and what it does where a request says nothing.

    Attributes:
        schedule: how data and noise were mixed.
        target: what the transformer predicts.
        fps: frames per second of the clips.
        num_steps, guidance_scale: what the model is meant to be sampled with.
    """

    schedule: Schedule
    target: Target = "velocity"
    fps: float = 16.0
    num_steps: int = 20
    guidance_scale: float = 4.0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps}: must be at least 1")
        if self.guidance_scale < 0:
            raise ValueError(f"guidance_scale={self.guidance_scale}: must be at least 0; 1 is none")


def write_scheduler(url: str, sampling: SamplingConfig) -> str:
    """Write the file below the model folder `url`; returns the name of the diffusers class that loads it.

    Raises:
        ValueError: a schedule that diffusers has no name for.
    """
    values = _values(sampling.schedule, sampling.target)
    meant = {
        "fps": sampling.fps,
        "num_inference_steps": sampling.num_steps,
        "guidance_scale": sampling.guidance_scale,
    }
    data = json.dumps({**values, **meant}, indent=2) + "\n"
    weights.write_bytes(data.encode(), url, *FILE)
    return str(values["_class_name"])


def read_scheduler(url: str) -> SamplingConfig:
    """What the file below the model folder `url` says.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a schedule or a prediction that is not known here.
    """
    values = json.loads(weights.read_bytes(url, *FILE))
    try:
        schedule, target = _schedule(values), _target(values)
    except ValueError as error:
        raise ValueError(f"{'/'.join((url.rstrip('/'), *FILE))}: {error}") from None
    return SamplingConfig(
        schedule=schedule,
        target=target,
        fps=float(values.get("fps", SamplingConfig.fps)),
        num_steps=int(values.get("num_inference_steps", SamplingConfig.num_steps)),
        guidance_scale=float(values.get("guidance_scale", SamplingConfig.guidance_scale)),
    )


def _values(schedule: Schedule, target: Target) -> dict[str, Any]:
    prediction = {"prediction_type": PREDICTION_TYPES[target]}
    if isinstance(schedule, RectifiedFlow):
        size = {} if schedule.base_tokens is None else {"base_tokens": schedule.base_tokens}
        if target == "velocity":
            euler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
            return {**euler, "shift": schedule.shift, **size}
        unipc = {"_class_name": "UniPCMultistepScheduler", "num_train_timesteps": 1000, "use_flow_sigmas": True}
        return {**unipc, "flow_shift": schedule.shift, **prediction, **size}
    assert isinstance(schedule, BetaSchedule)
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": schedule.num_train_steps,
        **_beta_values(schedule),
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        **prediction,
        "clip_sample": False,
        "timestep_spacing": "trailing",  # from the last step on, as ours (arXiv 2305.08891, section 3.3)
    }


def _beta_values(schedule: BetaSchedule) -> dict[str, Any]:
    (name,) = (name for name, schedule_class in PUBLISHED_SCHEDULES.items() if type(schedule) is schedule_class)
    if isinstance(schedule, LinearBetaSchedule | ScaledLinearSchedule):
        return {"beta_schedule": name, "beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
    assert isinstance(schedule, CosineSchedule)
    if (schedule.offset, schedule.max_beta) != (CosineSchedule.offset, CosineSchedule.max_beta):
        raise ValueError(
            f"offset={schedule.offset}, max_beta={schedule.max_beta}: diffusers' cosine schedule has "
            f"{CosineSchedule.offset} and {CosineSchedule.max_beta}, others cannot be saved"
        )
    return {"beta_schedule": name}


def _schedule(values: dict[str, Any]) -> Schedule:
    class_name = str(values.get("_class_name"))
    if class_name.startswith("FlowMatch") or values.get("use_flow_sigmas"):
        shift = values["shift"] if "shift" in values else values.get("flow_shift", 1.0)
        return RectifiedFlow(shift=float(shift), base_tokens=values.get("base_tokens"))
    name = values.get("beta_schedule")
    if name not in PUBLISHED_SCHEDULES or values.get("trained_betas") is not None:
        known = ", ".join(PUBLISHED_SCHEDULES)
        raise ValueError(
            f"_class_name={class_name!r}, beta_schedule={name!r}: known are flows (FlowMatch..., "
            f"or use_flow_sigmas) and, without trained_betas, {known}"
        )
    betas = {key: float(values.get(key, default)) for key, default in DEFAULT_BETAS.items()}
    return PUBLISHED_SCHEDULES[name](
        num_train_steps=int(values.get("num_train_timesteps", 1000)),
        zero_terminal_snr=bool(values.get("rescale_betas_zero_snr", False)),
        **({} if name == "squaredcos_cap_v2" else betas),
    )


def _target(values: dict[str, Any]) -> Target:
    is_flow_match = str(values.get("_class_name")).startswith("FlowMatch")
    prediction_type = "flow_prediction" if is_flow_match else values.get("prediction_type", "epsilon")
    for target, name in PREDICTION_TYPES.items():
        if name == prediction_type:
            return target
    raise ValueError(f"prediction_type={prediction_type!r}: known are {', '.join(PREDICTION_TYPES.values())}")
