"""Processes over gloo on the CPU, for tests of what happens between them."""

import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def launch(size, folder, function, *args):
    """What function(*args) returns in each of `size` processes of one group, by rank; a failure in one is raised."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(exist_ok=True)
    mp.spawn(_run, args=(size, port, folder, function, args), nprocs=size)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _run(rank, size, port, folder, function, args):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    torch.set_num_threads(1)
    torch.save(function(*args), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
