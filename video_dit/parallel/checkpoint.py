"""Sharded checkpoints (torch.distributed.checkpoint) that exist whole or not at all.

A step's folder is written beside its final name and renamed when every process is done and a manifest lists its files.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from video_dit.parallel.world import DistributedWorld
from video_dit.training import TrainState

MANIFEST = "manifest.json"


def save_checkpoint(folder: Path, state: TrainState, world: DistributedWorld) -> Path:
    """Write `folder/step-N`; every process must call it.

    Returns:
        the finished folder.
    """
    final = folder / f"step-{state.step}"
    partial = folder / f"step-{state.step}.partial"
    if world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    world.barrier()
    save(_as_dict(state), checkpoint_id=partial)
    world.barrier()
    if world.rank == 0:
        files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps({"step": state.step, "files": files}, indent=2))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    world.barrier()
    return final


def load_checkpoint(checkpoint: Path, state: TrainState) -> None:
    """Restore a state in place; the number of processes may differ from the one that saved."""
    values = _as_dict(state)
    load(values, checkpoint_id=checkpoint)
    set_state_dict(
        state.model,
        state.optimizers,
        model_state_dict=values["model"],
        optim_state_dict=values["optimizer"],
        options=StateDictOptions(strict=False),  # frozen parameters are not there; `load` has missed no other
    )
    state.ema = values["ema"]
    state.step = int(values["step"])


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step; None when there is none."""
    complete = [path for path in folder.glob("step-*") if is_complete(path)]
    return max(complete, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """Steps done when the checkpoint was taken."""
    return int(checkpoint.name.removeprefix("step-"))


def is_complete(checkpoint: Path) -> bool:
    """Whether the manifest is there and every file has the size it lists."""
    if checkpoint.suffix == ".partial" or not (checkpoint / MANIFEST).exists():
        return False
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    return all(
        (checkpoint / name).exists() and (checkpoint / name).stat().st_size == size for name, size in files.items()
    )


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints, and what was left half written."""
    complete = sorted((path for path in folder.glob("step-*") if is_complete(path)), key=step_of)
    kept = set(complete[-keep:])
    for path in folder.glob("step-*"):
        if path not in kept:
            shutil.rmtree(path)


def _as_dict(state: TrainState) -> dict[str, Any]:
    options = StateDictOptions(ignore_frozen_params=True)
    model, optimizer = get_state_dict(state.model, state.optimizers, options=options)
    return {"model": model, "optimizer": optimizer, "ema": state.ema, "step": state.step}
