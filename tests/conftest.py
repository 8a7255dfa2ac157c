"""One small local Ray cluster for the tests that need one, isolated from the user's home and cluster."""

import os
from pathlib import Path

import pytest

ON_CLUSTER = [Path(__file__).parent / name for name in ("pipeline", "jobs")]


def pytest_collection_modifyitems(items):
    """Under xdist, the tests that share the cluster run one after the other, in one process; the others beside them."""
    for item in items:
        if any(folder in item.path.parents for folder in ON_CLUSTER):
            item.add_marker(pytest.mark.xdist_group("cluster"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread_each():
    """Processes side by side wait for each other's threads."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory):
    """A local Ray cluster of four logical CPUs without dashboard; shared by the whole session."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # ray.init would turn tokens on for this process and write into HOME
    os.environ["HOME"] = str(tmp_path_factory.mktemp("home"))
    os.environ.pop("RAY_ADDRESS", None)
    import ray

    from pipeline import cluster

    cluster.connect(num_cpus=4, address="local", include_dashboard=False)
    yield ray
    ray.shutdown()
