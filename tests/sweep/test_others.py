"""Folders of conditions that hold something else than what a sweep wrote there."""

import json
from types import SimpleNamespace

import pytest

from altgrad_jax.config import load_config
from altgrad_jax.errors import UserError
from altgrad_jax.sweep.run import PARTS, _cut, _Unit, refuse_others

CONTENTS = {
    "config.json": ({"checkpoint": 3}, {"optimizer": [0.1]}),
    "manifest.json": ({"identity": {"data.sha256": 5}}, {"identity": []}),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_json_of_another_shape_is_one_line(tmp_path, name):
    condition = SimpleNamespace(name="one", config=load_config("bf16:quick"))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.json").write_text("{}")
    for content in CONTENTS[name]:
        (tmp_path / "one" / name).write_text(json.dumps(content))
        with pytest.raises(UserError, match=f"{name} is damaged: .*, not "):
            refuse_others([condition], tmp_path, "abc")


def test_a_group_is_cut_to_parts_of_at_least_one(tmp_path):
    unit = _Unit(tuple(SimpleNamespace(name=f"{i}") for i in range(3)), alone=False)
    for size in (0, -2):
        (tmp_path / PARTS).write_text(json.dumps({"size": size}))
        assert [len(part.conditions) for part in _cut(unit, tmp_path)] == [1, 1, 1]
