"""Every test runs on the CPU, as eight virtual devices; both are fixed when JAX is first imported, so this comes first.

Tests that need one device say so: `DataParallel(1)`. The fixtures import JAX themselves, for many tests do without.
"""

import gc
import os
import shutil
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"


MANY_MAPS = 30_000  # Linux refuses a process more than 65 530 by default


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What is exhaustive is slow too, so that `-m "not slow"` leaves it out."""
    for item in items:
        if item.get_closest_marker("exhaustive"):
            item.add_marker("slow")


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps():
    """Drops compiled programs before they exhaust the memory maps of this process: each takes several."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """The tiny main job: `tests.runs.Lab`."""
    from tests.runs import Lab

    return Lab(tmp_path_factory.getbasetemp() / "lab")


@pytest.fixture(scope="session")
def finished(lab, tmp_path_factory):
    """The work directory of the tiny job, finished at step 20. Not to be changed: take `copied`."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert lab.train(workdir) == 0
    return workdir


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of `finished`, to do with as one likes."""
    return shutil.copytree(finished, tmp_path / "run")
