"""Checkpoints exist whole or not at all: torn, altered and half-deleted ones are never used."""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed as dist
from problem import SIZES

from tests.s3_server import s3_server
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.parallel import checkpoint as checkpoints
from video_dit.parallel import failpoints
from video_dit.parallel.apply import ParallelConfig, parallelize
from video_dit.parallel.checkpoint import Checkpoints, Manifest, committed, prune, withdraw
from video_dit.parallel.checkpoint_files import CheckpointFiles, ShardReader, Written, index_name
from video_dit.parallel.failpoints import VARIABLE
from video_dit.parallel.world import DistributedWorld
from video_dit.training import OptimizerConfig, TrainState

FAILPOINTS = (
    "before_stage",
    "during_async_upload",
    "mid_shard_write",
    "before_metadata",
    "after_metadata_before_manifest",
    "before_commit",
    "after_commit_before_prune",
    "mid_prune",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A group of one process, in this one."""
    file = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield DistributedWorld("cpu")
    dist.destroy_process_group()


def new_state(world, seed=0, matrix_learning_rate=None):
    torch.manual_seed(seed)
    model = VideoDiT(VideoDiTConfig(num_attention_heads=2, num_layers=2, **SIZES))
    config = OptimizerConfig(matrix_learning_rate=matrix_learning_rate)
    return TrainState(parallelize(model, world.mesh, ParallelConfig(min_group=0)), config, world)


def go_on(state, until, late=()):
    """Updates that depend on nothing but the step; `late` parameters have no gradient before step 3."""
    while state.step < until:
        generator = torch.Generator().manual_seed(state.step)
        for name, parameter in state.model.named_parameters():
            if name in late and state.step < 3:
                continue
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.distributed.tensor.distribute_tensor(
                gradient, parameter.device_mesh, parameter.placements
            )
        state.update()


def tensors_of(state):
    optimizer = [value for o in state.optimizers for s in o.state.values() for value in s.values()]
    values = [*state.model.state_dict().values(), *state.ema.values(), *optimizer]
    return [value.full_tensor() if hasattr(value, "full_tensor") else value for value in values]


def assert_same(state, other):
    assert state.step == other.step
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(state), tensors_of(other), strict=True))


def restored(world, url):
    state = new_state(world, seed=1)
    step = Checkpoints(url, world).restore(state)
    assert step == (state.step or None)
    return state


def undisturbed(world, until):
    state = new_state(world)
    go_on(state, until)
    return state


@pytest.fixture(scope="module")
def saved(world, tmp_path_factory):
    """Checkpoints of steps 1 and 2."""
    url = str(tmp_path_factory.mktemp("saved"))
    state, keeper = new_state(world), Checkpoints(url, world)
    for step in (1, 2):
        go_on(state, step)
        keeper.save(state)
    keeper.wait()
    return url


def copy_of(saved, tmp_path):
    fs = fsspec.filesystem("file")
    fs.put(saved + "/", str(tmp_path / "copy") + "/", recursive=True)
    return str(tmp_path / "copy")


@pytest.fixture
def folder(request, tmp_path):
    """On a local disk, in memory, in a bucket."""
    if request.param != "s3":
        yield f"{request.param}{tmp_path}"
        return
    pytest.importorskip("s3fs")
    with s3_server() as client:
        client.create_bucket(Bucket="runs")
        yield "s3://runs"


@pytest.mark.parametrize("folder", ["", "memory://", "s3"], indirect=True)
def test_what_was_saved_is_restored_to_the_bit_while_training_goes_on(world, folder):
    url, state = f"{folder}/checkpoints", new_state(world)
    keeper = Checkpoints(url, world)
    assert keeper.restore(state) is None
    for step in (2, 4, 6):
        go_on(state, step)
        keeper.save(state)
        go_on(state, step + 1)  # must not reach the copy
    keeper.wait()
    assert [manifest.step for manifest in committed(url)] == [6, 4]
    other = restored(world, url)
    assert_same(other, undisturbed(world, 6))
    go_on(other, 8)
    assert_same(other, undisturbed(world, 8))
    fs, root = fsspec.url_to_fs(url)
    fs.invalidate_cache()
    assert sorted(path.rsplit("/", 1)[1] for path in fs.ls(root, detail=False)) == ["step-4", "step-6"]


@pytest.mark.parametrize("matrix_learning_rate", [None, 0.02])
def test_parameters_may_get_their_first_gradient_after_a_checkpoint(world, tmp_path, matrix_learning_rate):
    """As kernels over time do, of a VAE that trains on images first."""
    state = new_state(world, 0, matrix_learning_rate)
    keeper = Checkpoints(str(tmp_path), world, keep=3)
    late = [name for name, _ in state.model.named_parameters()][::2]
    for step in (2, 4, 6):
        go_on(state, step, late)
        keeper.save(state)
    keeper.wait()
    for step in (6, 4, 2):
        other = new_state(world, 1, matrix_learning_rate)
        assert Checkpoints(str(tmp_path), world).restore(other) == step
        go_on(other, 6, late)
        assert_same(other, state)
        withdraw(f"{tmp_path}/step-{step}")


def test_every_changed_bit_of_the_files_is_seen(saved, tmp_path):
    folder = Path(copy_of(saved, tmp_path), "step-2")
    manifest = Manifest.from_bytes((folder / "manifest.json").read_bytes())
    assert sorted([*manifest.files, "manifest.json"]) == sorted(path.name for path in folder.iterdir())
    rng = random.Random(0)
    for name, written in manifest.files.items():
        content = (folder / name).read_bytes()
        assert written.num_bytes == len(content)
        assert checkpoints._damage_of(str(folder), name, written) is None
        for place in [0, 8 * len(content) - 1, *(rng.randrange(8 * len(content)) for _ in range(150))]:
            changed = bytearray(content)
            changed[place // 8] ^= 1 << place % 8
            (folder / name).write_bytes(changed)
            assert checkpoints._damage_of(str(folder), name, written) == f"{name} was altered"
        (folder / name).write_bytes(content)


def test_every_changed_bit_of_the_manifest_is_seen(saved):
    content = Path(saved, "step-2", "manifest.json").read_bytes()
    assert Manifest.from_bytes(content).to_bytes() == content
    for place in range(8 * len(content)):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        with pytest.raises((ValueError, KeyError, TypeError)):
            Manifest.from_bytes(bytes(changed))


@pytest.mark.parametrize("damage", ["cut", "altered", "missing", "torn manifest", "no manifest", "index"])
def test_the_one_before_is_used_and_the_damaged_one_does_not_count_any_more(world, saved, tmp_path, damage):
    url = copy_of(saved, tmp_path)
    folder = Path(url, "step-2")
    (shard,), (index,) = folder.glob("*.distcp"), folder.glob("*-index")
    if damage == "cut":
        os.truncate(shard, shard.stat().st_size - 1)
    elif damage == "altered":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 4
        shard.write_bytes(content)
    elif damage == "missing":
        shard.unlink()
    elif damage == "index":
        index.write_bytes(index.read_bytes()[::-1])
    elif damage == "torn manifest":
        os.truncate(folder / "manifest.json", 40)
    else:
        (folder / "manifest.json").unlink()
    state = restored(world, url)
    assert_same(state, undisturbed(world, 1))
    assert [manifest.step for manifest in committed(url)] == [1]
    keeper = Checkpoints(url, world, keep=1)
    go_on(state, 2)
    keeper.save(state)
    keeper.wait()
    assert [manifest.step for manifest in committed(url)] == [2]
    assert_same(restored(world, url), undisturbed(world, 2))


@pytest.fixture(scope="module")
def writes_of_a_save(world, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "none, but count")
        before = failpoints._passed.get("mid_shard_write", 0)
        keeper = Checkpoints(str(tmp_path_factory.mktemp("writes")), world)
        keeper.save(undisturbed(world, 1))
        keeper.wait()
        return failpoints._passed["mid_shard_write"] - before


@pytest.mark.parametrize("place", FAILPOINTS)
def test_death_anywhere_in_a_save_leaves_a_checkpoint_to_go_on_from(world, tmp_path, place, writes_of_a_save):
    """A process that saves steps 1, 2, 3, ... dies at the third one."""
    command = [sys.executable, __file__, str(tmp_path)]
    number = {"mid_shard_write": 5 * writes_of_a_save // 2, "mid_prune": 1}.get(place, 3)
    environment = {**os.environ, VARIABLE: f"{place}:{number}", "PYTHONPATH": str(Path(__file__).parents[3])}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr
    state = restored(world, str(tmp_path))
    committed_third = place in ("after_commit_before_prune", "mid_prune")
    assert state.step == (3 if committed_third else 2)
    assert_same(state, undisturbed(world, state.step))
    keeper = Checkpoints(str(tmp_path), world, keep=2)
    for step in (4, 5):
        go_on(state, step)
        keeper.save(state)
    keeper.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-4", "step-5"]
    assert_same(restored(world, str(tmp_path)), undisturbed(world, 5))


def test_an_attempt_that_was_taken_over_does_not_commit(world, tmp_path):
    def refuse():
        raise PermissionError("taken over")

    state = undisturbed(world, 1)
    keeper = Checkpoints(str(tmp_path), world, may_commit=refuse)
    keeper.save(state)
    with pytest.raises(PermissionError, match="taken over"):
        keeper.wait()
    assert committed(str(tmp_path)) == []


def test_files_of_two_attempts_at_a_step_do_not_mix(world, tmp_path):
    state = undisturbed(world, 1)
    for _ in range(2):
        keeper = Checkpoints(str(tmp_path), world)
        keeper.save(state)
        keeper.wait()
    (manifest,) = committed(str(tmp_path))
    names = {path.name for path in (tmp_path / "step-1").iterdir()}
    assert len(names) == 5  # a shard and an index of each, and one manifest
    assert all(name.startswith(manifest.attempt) for name in manifest.files)
    assert_same(restored(world, str(tmp_path)), state)


def test_pruning_keeps_the_newest_and_what_is_being_written(tmp_path):
    for step in (1, 2, 3, 5):
        folder = tmp_path / f"step-{step}"
        folder.mkdir()
        manifest = Manifest(step, "a", {"a-index": Written(0, "")})
        (folder / "manifest.json").write_bytes(manifest.to_bytes())
    for step in (4, 6):
        (tmp_path / f"step-{step}").mkdir()  # begun
    prune(str(tmp_path), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-3", "step-5", "step-6"]


def test_an_index_with_code_in_it_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch evil",)

    (tmp_path / index_name("a")).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(pickle.UnpicklingError, match=r"may not hold posix\.system"):
        ShardReader(CheckpointFiles(str(tmp_path)), "a").read_metadata()


def test_a_manifest_tells_what_is_in_the_folder(saved):
    fields = json.loads(Path(saved, "step-1", "manifest.json").read_text().splitlines()[0])
    assert list(fields) == ["step", "attempt", "files"]
    assert all(path.stat().st_size == fields["files"][path.name][0] for path in Path(saved, "step-1").glob("*-*"))


def save_on_and_on(folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}.group", rank=0, world_size=1)
    world = DistributedWorld("cpu")
    state, keeper = new_state(world), Checkpoints(folder, world, keep=2)
    for step in range(1, 9):
        go_on(state, step)
        keeper.save(state)
        keeper.wait()


if __name__ == "__main__":
    save_on_and_on(sys.argv[1])
