"""One small finished run for all tests of the API that only read it."""

import numpy as np
import pytest
from api_settings import settings

import fedprompt as fp


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of FedAvg of three rounds."""
    output = tmp_path_factory.mktemp("api") / "run"
    return fp.run(settings("algorithm.name=fedavg", "federation.rounds=3"), output=output, local=True)


@pytest.fixture(scope="session")
def images():
    """Twenty random grey images of 8 pixels."""
    return np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
