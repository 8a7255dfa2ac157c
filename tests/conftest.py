"""One small local Ray cluster for the tests that need one, isolated from the user's home and cluster."""

import os

import pytest


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory):
    """A local Ray cluster of four logical CPUs without dashboard; shared by the whole session."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # ray.init would turn tokens on for this process and write into HOME
    os.environ["HOME"] = str(tmp_path_factory.mktemp("home"))
    os.environ.pop("RAY_ADDRESS", None)
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"  # the end of a run or a worker is seen sooner
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # one process less a worker group; `test_elastic` has it
    import ray

    from pipeline import cluster

    cluster.connect(num_cpus=4, address="local", include_dashboard=False)
    yield ray
    ray.shutdown()
