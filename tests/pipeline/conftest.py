"""The whole way to a small model, gone once for all tests of this folder."""

import pytest

from jobs.recipes import smoke_cpu
from pipeline.chain import Chain


@pytest.fixture(scope="session")
def recipe():
    return smoke_cpu()


@pytest.fixture(scope="session")
def chain(ray_cluster, tmp_path_factory, recipe):
    return Chain(recipe, None, str(tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="session")
def latents(chain):
    (latents,) = chain.latents()
    return latents


@pytest.fixture(scope="session")
def model(chain, latents):
    return chain.model()
