"""The API in this process, without workers."""

from dataclasses import replace

import fake_generator
import pytest
from fastapi.testclient import TestClient

from pipeline.serve.api import Service, create_api
from pipeline.serve.config import ServeConfig
from pipeline.serve.jobs import JobStore


@pytest.fixture
def config(tmp_path):
    return ServeConfig(model=f"{tmp_path}/toy", storage=f"{tmp_path}/out", generator="fake_generator")


@pytest.fixture
def connect(config):
    stores = []

    def connect(**changes):
        changed = replace(config, **changes)
        stores.append(JobStore(changed.database_url))
        return TestClient(create_api(Service(config=changed, jobs=stores[-1], limits=fake_generator.LIMITS)))

    yield connect
    for store in stores:
        store.close()


@pytest.fixture
def client(connect):
    return connect()
