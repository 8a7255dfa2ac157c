"""A run's checkpoints: written while training goes on, and there only when a manifest, written last, says so.

    <url>/step-N/ATTEMPT-R-K.distcp    shards of process R (torch.distributed.checkpoint)
    <url>/step-N/ATTEMPT-index         where each tensor is in them
    <url>/step-N/manifest.json         the attempt, and size and hash of each of its files: the commit

What is the newest checkpoint is found by looking, never told by a pointer. One that is cut short or altered is passed
over, and the one before is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import fsspec
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from video_dit.parallel.checkpoint_files import CheckpointFiles, ShardReader, ShardWriter, Written
from video_dit.parallel.failpoints import reach
from video_dit.parallel.world import DistributedWorld
from video_dit.training import TrainState

MANIFEST = "manifest.json"

logger = logging.getLogger(__name__)


class Manifest(NamedTuple):
    """What a committed checkpoint is made of."""

    step: int
    attempt: str
    files: dict[str, Written]

    def to_bytes(self) -> bytes:
        """JSON in one line, and its hash in another: a changed bit anywhere is seen."""
        files = {name: list(written) for name, written in sorted(self.files.items())}
        body = json.dumps({"step": self.step, "attempt": self.attempt, "files": files}).encode()
        return body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n"

    @classmethod
    def from_bytes(cls, content: bytes) -> Manifest:
        """Raises ValueError for anything that `to_bytes` did not make."""
        body = content.split(b"\n")[0]
        fields = json.loads(body)
        files = {name: Written(*written) for name, written in fields["files"].items()}
        manifest = cls(fields["step"], fields["attempt"], files)
        if manifest.to_bytes() != content:
            raise ValueError("its hash does not match")
        return manifest


class Checkpoints:
    """Saves and restores the state of a run. Every process makes one and calls its methods in the same order.

    Args:
        url: folder of the checkpoints, on any file system that all processes share.
        world: the processes.
        keep: how many are kept.
        may_commit: raises when another attempt has taken the run over; called before each commit.
    """

    def __init__(
        self, url: str, world: DistributedWorld, keep: int = 2, may_commit: Callable[[], None] = lambda: None
    ) -> None:
        self.url, self.keep, self._may_commit = url, keep, may_commit
        self._rank, self._size = world.rank, world.size
        self._group = dist.new_group(backend="gloo")  # its own: it is used while training uses the other
        self._attempt = self._told_by_first(uuid.uuid4().hex[:8])
        self._stager = BlockingAsyncStager(cache_staged_state_dict=True)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, state: TrainState) -> None:
        """Copy the state, and write the copy while training goes on; waits for the one before."""
        self.wait()
        reach("before_stage")
        self._pending = self._thread.submit(self._write, state.step, self._stage(_tensors_of(state)[0]))

    def wait(self) -> None:
        """Until what was saved is committed; raises what went wrong with it."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def restore(self, state: TrainState) -> int | None:
        """Load the newest whole checkpoint, saved by any number of processes.

        Returns:
            its step; None when there is none.
        """
        for manifest in self._told_by_first(committed(self.url) if self._rank == 0 else None):
            folder = step_folder(self.url, manifest.step)
            damage = self._damage(folder, manifest)
            if damage is None:
                _load(folder, manifest, state, self._group)
                return manifest.step
            logger.warning("checkpoint %s: %s; the one before it is used", folder, damage)
            if self._rank == 0:
                withdraw(folder)
        return None

    def _stage(self, values: dict[str, Any]) -> dict[str, Any]:
        """Copy tensors to memory that is kept from one checkpoint to the next, page-locked where there is a GPU."""
        if self._stager.state_dict_cache is None and not torch.cuda.is_available():
            self._stager.state_dict_cache = BlockingAsyncStager().stage(values)
            return self._stager.state_dict_cache
        return self._stager.stage(values)

    def _write(self, step: int, values: dict[str, Any]) -> None:
        reach("during_async_upload")
        files = CheckpointFiles(step_folder(self.url, step))
        save(values, storage_writer=ShardWriter(files, self._attempt), process_group=self._group)
        reach("after_metadata_before_manifest")
        written: list[Any] = [None] * self._size
        dist.all_gather_object(written, files.written, group=self._group)
        if self._rank == 0:
            merged = {name: file for part in written for name, file in part.items()}
            self._may_commit()
            reach("before_commit")
            commit(files, Manifest(step, self._attempt, merged))
            reach("after_commit_before_prune")
            prune(self.url, self.keep)
        dist.barrier(group=self._group)

    def _damage(self, folder: str, manifest: Manifest) -> str | None:
        """What is wrong with a checkpoint's files, found by all processes together; None for nothing."""
        names = sorted(manifest.files)[self._rank :: self._size]
        found = next(filter(None, (_damage_of(folder, name, manifest.files[name]) for name in names)), None)
        everywhere: list[str | None] = [None] * self._size
        dist.all_gather_object(everywhere, found, group=self._group)
        return next(filter(None, everywhere), None)

    def _told_by_first(self, value: Any) -> Any:
        told = [value]
        dist.broadcast_object_list(told, src=0, group=self._group)
        return told[0]


def step_folder(url: str, step: int) -> str:
    """Of a step's checkpoint."""
    return f"{url.rstrip('/')}/step-{step}"


def committed(url: str) -> list[Manifest]:
    """Manifests of all checkpoints that were committed, the newest first; warns of those that cannot be read."""
    fs, root = fsspec.url_to_fs(url)
    fs.invalidate_cache()  # of listings
    manifests = []
    for path in fs.glob(f"{root.rstrip('/')}/step-*/{MANIFEST}"):
        try:
            manifest = Manifest.from_bytes(fs.cat_file(path))
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("checkpoint %s cannot be read (%s) and is passed over", path, error)
            continue
        if path.rsplit("/", 2)[-2] == f"step-{manifest.step}":
            manifests.append(manifest)
    return sorted(manifests, key=lambda manifest: -manifest.step)


def commit(files: CheckpointFiles, manifest: Manifest) -> None:
    """Say that a checkpoint is there: one file, which appears as a whole."""
    target = files.path(MANIFEST)
    if "file" not in files.fs.protocol:
        files.fs.pipe_file(target, manifest.to_bytes())  # object stores show whole objects only
        return
    with files.create_stream(f"{manifest.attempt}-{MANIFEST}", "wb") as stream:
        stream.write(manifest.to_bytes())
        stream.sync()
    files.fs.mv(files.path(f"{manifest.attempt}-{MANIFEST}"), target)
    files.sync_folder()


def withdraw(folder: str) -> None:
    """Take a damaged checkpoint's commit back, so that it does not count among those that are kept."""
    files = CheckpointFiles(folder)
    files.fs.mv(files.path(MANIFEST), files.path(f"damaged-{MANIFEST}"))


def prune(url: str, keep: int) -> None:
    """Delete all but the newest `keep` committed checkpoints, and what older attempts left half written."""
    fs, root = fsspec.url_to_fs(url)
    kept = {step_folder(root, manifest.step) for manifest in committed(url)[:keep]}
    newest = max((int(folder.rsplit("-", 1)[1]) for folder in kept), default=-1)
    for folder in fs.glob(f"{root.rstrip('/')}/step-*"):
        number = folder.rsplit("-", 1)[1]
        if folder not in kept and number.isdigit() and int(number) < newest:
            if fs.exists(f"{folder}/{MANIFEST}"):
                fs.rm_file(f"{folder}/{MANIFEST}")  # first: what is half deleted is no checkpoint
            reach("mid_prune")
            fs.rm(folder, recursive=True)


def _damage_of(folder: str, name: str, expected: Written) -> str | None:
    files = CheckpointFiles(folder)
    try:
        found = files.fs.size(files.path(name))
        if found != expected.num_bytes:
            return f"{name} has {found} bytes instead of {expected.num_bytes}"
        return None if files.sha256(name) == expected.sha256 else f"{name} was altered"
    except FileNotFoundError:
        return f"{name} is missing"


def _tensors_of(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """All that a run goes on from, in tensors; and the optimizers' settings, which do not change and are not stored."""
    options = StateDictOptions(ignore_frozen_params=True)
    model, optimizer = get_state_dict(state.model, state.optimizers, options=options)
    return {"model": model, "optimizer": optimizer.pop("state"), "ema": state.ema}, optimizer


def _load(folder: str, manifest: Manifest, state: TrainState, group: dist.ProcessGroup) -> None:
    values, settings = _tensors_of(state)
    load(values, storage_reader=ShardReader(CheckpointFiles(folder), manifest.attempt), process_group=group)
    set_state_dict(
        state.model,
        state.optimizers,
        model_state_dict=values["model"],
        optim_state_dict={**settings, "state": values["optimizer"]},
        options=StateDictOptions(strict=False),  # frozen parameters are not there; `load` has missed no other
    )
    state.ema = values["ema"]
    state.step = manifest.step
