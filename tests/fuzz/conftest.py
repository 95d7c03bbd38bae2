"""How many examples the fuzzers try: few in every test run, many with ``--hypothesis-profile=long``."""

import pytest
import torch
from hypothesis import HealthCheck, settings

_ALWAYS = {"deadline": None, "suppress_health_check": list(HealthCheck)}
# The short form draws the same examples every time, so that it fails for changes of the code only.
settings.register_profile("short", max_examples=300, derandomize=True, **_ALWAYS)
settings.register_profile("long", max_examples=43_200, print_blob=True, **_ALWAYS)
if settings.get_current_profile_name() != "long":
    settings.load_profile("short")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny products are slower on several threads than on one."""
    torch.set_num_threads(1)
