"""The scripts of launch/ on stubs."""

import pytest

from tests.launch.stubs import Desk


@pytest.fixture
def desk(tmp_path) -> Desk:
    """A fresh `Desk`."""
    return Desk(tmp_path)
