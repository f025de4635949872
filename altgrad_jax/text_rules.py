"""What names, paths and other texts of the configuration must be like, as far as that shows without looking anywhere.

Weights & Biases has rules of its own for the names it is given, and tells them only when a run starts.
"""

import re
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from altgrad_jax.config_keys import get

# Settings that may be left out. A path or name of None is what others write to leave one out.
OPTIONAL = (
    *("data.path", "data.cache", "precision.kernel_tiles", "checkpoint.restore_from", "tracking.entity"),
    *("parallel.coordinator", "runtime.compilation_cache"),
)
NOT_EMPTY = ("data.data_dir", "tracking.name", "tracking.project")
LONGEST_NAME, LONGEST_TAG = 128, 64  # characters that W&B takes
NOT_IN_PROJECT = "/\\#?%:"  # characters that W&B refuses there


def text_violations(config: ConfigDict) -> Iterator[str]:
    """Every text that cannot be meant, or that would be refused later, each in one sentence with the rule."""
    for key in OPTIONAL:
        value = get(config, key)
        if isinstance(value, str) and value.strip().lower() in ("none", "null"):
            yield f"config.{key}={value} is taken for a name: leave it out, or leave it empty (--config.{key}=)"
    for key in (*OPTIONAL, *NOT_EMPTY):
        value = get(config, key)
        if isinstance(value, str) and (re.search(r"[\x00-\x1f\x7f]", value) or (value and not value.strip())):
            yield f"config.{key}={value!r} holds characters that cannot be seen: write it without them"
    for key in NOT_EMPTY:
        if not get(config, key):
            yield f"config.{key} is empty: give it a name"
    yield from _source_violations(config.checkpoint.restore_from)
    yield from _tracking_violations(config.tracking)


def _source_violations(source: str | None) -> Iterator[str]:
    """A checkpoint's own folder, or one of a run's, where RUN@STEP is wanted."""
    found = re.fullmatch(r"(.*?)/+checkpoints/+(\d+)(?:/.*)?", source or "")
    if found:
        yield (
            f"config.checkpoint.restore_from={source} is the folder of one checkpoint: write {found[1]}@{found[2]},"
            " the run and the step"
        )


def _tracking_violations(tracking: ConfigDict) -> Iterator[str]:
    project = tracking.project
    if found := sorted(set(project) & set(NOT_IN_PROJECT)):
        owner, _, name = project.partition("/")
        way_out = (
            f"; for a project of {owner!r}: config.tracking.entity={owner}, project={name}" if "/" in found else ""
        )
        yield (
            f"config.tracking.project={project!r} has {' '.join(found)} in it, and W&B's projects have none of"
            f" {' '.join(NOT_IN_PROJECT)}{way_out}"
        )
    named = {"project": project, "entity": tracking.entity or ""}
    if tracking.wandb != "disabled":  # else the name is only that of a folder
        named["name"] = tracking.name
    for key, value in named.items():
        if len(value) > LONGEST_NAME:
            yield f"config.tracking.{key} has {len(value)} characters, and W&B takes up to {LONGEST_NAME}"
    for tag in tracking.tags:
        yield from _tag_violations(tag)


def _tag_violations(tag: Any) -> Iterator[str]:
    if not isinstance(tag, str):
        yield f"config.tracking.tags: {tag!r} is no text; tags are texts of 1 to {LONGEST_TAG} characters, ('a', 'b')"
    elif not tag.strip():
        yield f"config.tracking.tags: {tag!r} is empty; tags have 1 to {LONGEST_TAG} characters"
    elif len(tag) > LONGEST_TAG:
        yield f"config.tracking.tags: {tag[:20]}... has {len(tag)} characters; tags have 1 to {LONGEST_TAG}"
