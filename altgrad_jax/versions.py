"""Whether the parts of JAX that are installed belong together: jax, jaxlib, and XLA's compilers for NVIDIA GPUs.

pip brings the compilers (`jax-cuda13-plugin`, `jax-cuda13-pjrt`) in their newest version unless it is told not to. One
that was not built beside jaxlib may be left alone by JAX, with a warning, or may compile what the other never would.
"""

import re
from importlib import metadata

from altgrad_jax.errors import UserError

COMPILERS = tuple(f"jax-cuda{n}-{part}" for n in (12, 13) for part in ("plugin", "pjrt"))


def installed() -> dict[str, str]:
    """Package -> version, of jax, jaxlib and the compilers that are there."""
    found = {}
    for name in ("jax", "jaxlib", *COMPILERS):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def check_versions() -> None:
    """Refuses parts that do not belong together.

    Raises:
      UserError: naming the versions and the command that mends them.
    """
    found = installed()
    wanted = _release(found["jaxlib"])
    # jax itself says so where it and jaxlib differ too much; it allows a newer jax beside the jaxlib before it.
    wrong = {name: version for name, version in found.items() if name in COMPILERS and _release(version) != wanted}
    if wrong:
        listed = ", ".join(f"{name} {version}" for name, version in wrong.items())
        mended = " ".join(f"{name}=={found['jaxlib']}" for name in wrong)
        raise UserError(
            f"{listed} beside jaxlib {found['jaxlib']}: they must be of one version; pip install {mended}, or install"
            " with -c constraints.txt"
        )


def compiler(platform: str) -> str:
    """What compiles for a platform, for people: "jaxlib 0.10.2", or jax-cuda13-pjrt's version for GPUs."""
    found = installed()
    parts = [f"{name} {version}" for name, version in found.items() if name.endswith("-pjrt")]
    return f"XLA of {', '.join(parts) if platform == 'gpu' and parts else 'jaxlib ' + found['jaxlib']}"


def _release(version: str) -> str:
    """ "0.12.0" of "0.12.0.1" and "0.12.0rc1"."""
    return ".".join(re.findall(r"\d+", version)[:3])
