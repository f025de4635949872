"""What differs between two runs, in a line that people read."""

import re
from collections.abc import Mapping
from typing import Any

LAYER = "precision.layers."


def differences(stored: Mapping[str, Any], current: Mapping[str, Any], most: int | None = None) -> str:
    """The entries that two flat dicts do not share, all or the first `most`: "name: old -> new; ...".

    Hashes are cut to 8 digits, and layers that changed alike stand together: "17 layers: e4m3fn -> e5m2".
    """
    changed: dict[tuple[str, str], list[str]] = {}
    lines = []
    for name in sorted(stored.keys() | current.keys()):
        old, new = stored.get(name, "absent"), current.get(name, "absent")
        if old == new:
            continue
        if name.startswith(LAYER):
            changed.setdefault((str(old), str(new)), []).append(name.removeprefix(LAYER))
        else:
            lines.append(f"{name}: {_short(old)} -> {_short(new)}")
    for (old, new), layers in changed.items():
        which = f"{len(layers)} layers" if len(layers) > 1 else f"{LAYER}{layers[0]}"
        lines.append(f"{which}: {' -> '.join(_apart(_short(old), _short(new)))}")
    more = [] if most is None or len(lines) <= most else [f"and {len(lines) - most} more"]
    return "; ".join(lines[:most] + more)


def _short(value: Any) -> str:
    """A hash's first 8 digits; of three roles that are alike, one."""
    text = str(value)
    if re.fullmatch(r"[0-9a-f]{40,64}", text):
        return text[:8]
    roles = text.split(" | ")
    return roles[0] if len(roles) > 1 and len(set(roles)) == 1 else text


def _apart(old: str, new: str) -> tuple[str, str]:
    """Two texts without the words that both end in, as long as something is left of each."""
    a, b = old.split(" "), new.split(" ")
    while len(a) > 1 and len(b) > 1 and a[-1] == b[-1] and "|" not in (*a, *b):
        a, b = a[:-1], b[:-1]
    return " ".join(a), " ".join(b)
