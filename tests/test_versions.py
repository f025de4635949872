"""Parts of JAX that do not belong together."""

import pytest

from altgrad_jax import versions
from altgrad_jax.errors import UserError

TOGETHER = {"jax": "0.10.2", "jaxlib": "0.10.2", "jax-cuda13-plugin": "0.10.2", "jax-cuda13-pjrt": "0.10.2"}


def test_what_is_here_belongs_together():
    versions.check_versions()
    assert versions.installed()["jax"]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"jax-cuda13-plugin": "0.12.0"}, "jax-cuda13-plugin 0.12.0 beside jaxlib 0.10.2"),
        ({"jax-cuda13-pjrt": "0.10.1"}, "pip install jax-cuda13-pjrt==0.10.2, or install with -c constraints.txt"),
        (
            {"jax-cuda12-plugin": "0.9.0", "jax-cuda12-pjrt": "0.9.0"},
            "jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2",
        ),
        ({"jaxlib": "0.12.0.1"}, "jax-cuda13-plugin 0.10.2, jax-cuda13-pjrt 0.10.2 beside jaxlib 0.12.0.1"),
    ],
)
def test_others_are_refused_with_the_command_that_mends_them(monkeypatch, changed, says):
    monkeypatch.setattr(versions, "installed", lambda: TOGETHER | changed)
    with pytest.raises(UserError) as caught:
        versions.check_versions()
    assert says in str(caught.value)


def test_a_release_built_twice_is_the_same(monkeypatch):
    built = {"jaxlib": "0.12.0.1", "jax-cuda13-plugin": "0.12.0", "jax-cuda13-pjrt": "0.12.0"}
    monkeypatch.setattr(versions, "installed", lambda: TOGETHER | built)
    versions.check_versions()
    assert versions.compiler("gpu") == "XLA of jax-cuda13-pjrt 0.12.0"
    assert versions.compiler("cpu") == "XLA of jaxlib 0.12.0.1"
