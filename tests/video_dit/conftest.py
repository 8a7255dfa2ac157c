"""The generator of one random model folder, for all tests that make videos."""

import pytest
from random_pipeline import save_random_pipeline

from video_dit.generator import Generator


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_random_pipeline(folder)
    return str(folder)


@pytest.fixture(scope="session")
def generator(folder):
    return Generator.from_pretrained(folder)
