"""Checkpoints hold every bit, whatever goes on meanwhile, and one that was damaged is never believed."""

import random
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_jax.checkpoint import Checkpoints, Restored, committed_steps, read, read_manifest, read_params
from altgrad_jax.errors import UserError
from altgrad_jax.parallel import DataParallel
from altgrad_jax.state import tree_sha256
from tests.runs import snapshot

IDENTITY = {"model.n_layer": 1, "seed": 0}
STEPS = (10, 20, 30)
# What Orbax writes for itself and nothing here relies on.
UNUSED = ("_CHECKPOINT_METADATA", "commit_success.txt", "_sharding", "manifest.ocdbt")


def make_state(step: int, devices: int = 1) -> dict[str, Any]:
    """Arrays of many types and of shapes that no number of devices divides."""
    draw = np.random.default_rng(step)
    params = {
        "matrix": draw.normal(size=(257, 33)).astype(np.float32),
        "gain": draw.normal(size=31).astype(np.float32),
        "half": jnp.asarray(draw.normal(size=(5, 7)), jnp.bfloat16),
        "eighth": jnp.asarray(draw.normal(size=(3, 5)), jnp.float8_e5m2),
    }
    special = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45], np.float32)
    rest = {"count": np.int32(step), "flags": np.array([True, False, True]), "codes": np.arange(7, dtype=np.uint8)}
    return jax.device_put({"params": params, "special": special, **rest}, DataParallel(devices).replicated)


def like(devices: int = 1) -> Any:
    return DataParallel(devices).abstract(make_state(0))


def save(checkpoints: Checkpoints, step: int, state: Any) -> None:
    checkpoints.save(step, state, {"next_step": step}, {"identity": IDENTITY, "seconds": 1.5})


def restore(folder: Path, wanted: Any = None, identity: dict[str, Any] = IDENTITY) -> Restored | None:
    checkpoints = Checkpoints(folder, max_to_keep=3)
    try:
        return checkpoints.restore_latest(like() if wanted is None else wanted, identity)
    finally:
        checkpoints.close()


def assert_is(restored: Restored | None, step: int) -> None:
    assert restored is not None and restored.step == step
    assert tree_sha256(restored.state) == tree_sha256(make_state(step))
    assert restored.iterator == {"next_step": step}
    assert restored.manifest["identity"] == IDENTITY and restored.manifest["seconds"] == 1.5


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "checkpoints"
    checkpoints = Checkpoints(folder, max_to_keep=3)
    for step in (5, *STEPS):
        save(checkpoints, step, make_state(step))
    checkpoints.close()
    return folder


@pytest.fixture
def folder(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "checkpoints"))


def test_the_newest_three_are_kept_and_the_newest_restored(folder):
    assert committed_steps(folder) == list(STEPS)
    assert_is(restore(folder), 30)
    assert not (folder.parent / "damaged").exists()


@pytest.mark.parametrize(("before", "after"), [(8, 8), (1, 8), (8, 1), (8, 3)])
def test_bits_do_not_depend_on_the_number_of_devices(tmp_path, before, after):
    checkpoints = Checkpoints(tmp_path, max_to_keep=1)
    save(checkpoints, 7, make_state(7, before))
    checkpoints.close()
    restored = restore(tmp_path, like(after))
    assert_is(restored, 7)
    assert all(leaf.sharding == DataParallel(after).replicated for leaf in jax.tree.leaves(restored.state))


@pytest.mark.parametrize("devices", [1, 8])
def test_a_save_in_progress_does_not_see_the_steps_that_follow(tmp_path, devices):
    """Each step donates the buffers that the save before it may still be writing out."""
    parallel = DataParallel(devices)
    large = {"a": jnp.ones(4_000_037), "b": jnp.arange(1_000_003.0), "c": jnp.zeros((101, 257))}
    step = parallel.train_step(lambda state, x: (jax.tree.map(lambda a: a * 1.5 - x.sum(), state), x.sum()))
    state, one = jax.device_put(large, parallel.replicated), parallel.shard(np.ones((devices, 1), np.int32))
    checkpoints = Checkpoints(tmp_path, max_to_keep=3)
    hashes, overlapped = {}, False
    for number in range(3):
        state, _ = jax.block_until_ready(step(state, one))
        hashes[number] = tree_sha256(jax.tree.map(jnp.copy, state))
        save(checkpoints, number, state)
        for _ in range(4):
            state, _ = step(state, one)
        overlapped |= number not in committed_steps(tmp_path)
    assert overlapped, "the steps must fall into a save for this to show anything"
    checkpoints.close()
    wanted = parallel.abstract(large)
    for number, expected in hashes.items():
        restored = read(tmp_path, number, wanted, read_manifest(tmp_path, number))  # verifies the checksums
        assert tree_sha256(restored.state) == expected


def damage(path: Path, how: str, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
        return
    if how == "flipped":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    content = {"empty": b"", "truncated": data[: len(data) // 2], "zeroed": bytes(len(data)), "flipped": data}[how]
    path.write_bytes(content)


WAYS = [
    "deleted",
    "flipped",
    *(pytest.param(w, marks=pytest.mark.exhaustive) for w in ("empty", "truncated", "zeroed")),
]


@pytest.mark.parametrize("how", WAYS)
def test_every_damaged_file_is_detected_or_does_not_matter(written, tmp_path, caplog, how):
    draw = random.Random(how)
    names = sorted(path.relative_to(written) for path in (written / "30").rglob("*") if path.is_file())
    detected = []
    for i, name in enumerate(names):
        folder = Path(shutil.copytree(written, tmp_path / f"{i}" / "checkpoints"))
        damage(folder / name, how, draw)
        caplog.clear()
        restored = restore(folder)
        if (folder / "30").exists():  # believed, so it must be right
            assert_is(restored, 30)
            continue
        detected.append(name)
        assert_is(restored, 20)
        assert committed_steps(folder) == [10, 20]
        assert (folder.parent / "damaged" / "30.0").is_dir()
        told, moved = [text for name, _, text in caplog.record_tuples if name == "altgrad_jax.checkpoint"]
        assert told.startswith(f"checkpoint {folder / '30'} is damaged: ")
        assert moved == f"moved to {folder.parent / 'damaged' / '30.0'}; resuming from step 20"
    undetected = {name for name in names if name not in detected and name.name not in UNUSED}
    # Of Orbax's copies of the arrays some are superseded, and what is deleted of its notes it does without.
    assert {name.parent.name for name in undetected} <= {"d", "state", "array_metadatas"}, undetected
    assert {"manifest", "iterator", "d"} <= {name.parent.name for name in detected}


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_a_half_deleted_checkpoint(folder, share):
    files = [path for path in (folder / "30").rglob("*") if path.is_file()]
    random.Random(share).shuffle(files)
    for path in files[: round(share * len(files))]:
        path.unlink()
    assert_is(restore(folder), 20)


def test_damage_that_the_storage_cannot_see(folder):
    """Whole files of another checkpoint: only the checksums of the arrays tell."""
    shutil.rmtree(folder / "30" / "state")
    shutil.copytree(folder / "20" / "state", folder / "30" / "state")
    shutil.rmtree(folder / "20" / "manifest")
    shutil.copytree(folder / "10" / "manifest", folder / "20" / "manifest")
    assert_is(restore(folder), 10)
    assert sorted(path.name for path in (folder.parent / "damaged").iterdir()) == ["20.0", "30.0"]


def test_where_all_are_damaged_nothing_starts_and_nothing_moves(folder):
    for step in STEPS:
        (folder / str(step) / "manifest" / "metadata").write_text("{}")
    before = snapshot(folder.parent)
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged \(steps 30, 20, 10\); bring back a copy"):
        restore(folder)
    assert snapshot(folder.parent) == before


def test_a_damaged_older_checkpoint_harms_nobody(folder):
    shutil.rmtree(folder / "10" / "state")
    (folder / "20" / "manifest" / "metadata").unlink()
    checkpoints = Checkpoints(folder, max_to_keep=3)
    assert_is(checkpoints.restore_latest(like(), IDENTITY), 30)
    for step in (40, 50, 60):
        save(checkpoints, step, make_state(step))
    checkpoints.close()
    assert committed_steps(folder) == [40, 50, 60]


def test_the_same_step_may_be_damaged_twice(folder):
    for number in range(2):
        (folder / "30" / "iterator" / "metadata").unlink()
        checkpoints = Checkpoints(folder, max_to_keep=3)
        assert_is(checkpoints.restore_latest(like(), IDENTITY), 20)
        save(checkpoints, 30, make_state(30))
        checkpoints.close()
        assert (folder.parent / "damaged" / f"30.{number}").is_dir()
    assert_is(restore(folder), 30)


def test_what_a_killed_save_leaves_is_removed_and_not_taken_for_a_checkpoint(folder):
    shutil.copytree(folder / "30", folder / "40.orbax-checkpoint-tmp")
    assert_is(restore(folder), 30)
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20", "30"]


def test_no_checkpoint_is_no_error(tmp_path):
    assert restore(tmp_path / "new") is None
    assert committed_steps(tmp_path / "nowhere") == []


def test_another_run_is_refused_with_the_list_of_differences(folder):
    before = snapshot(folder.parent)
    other = {"model.n_layer": 2, "seed": 0, "optimizer.name": "adamw"}
    with pytest.raises(UserError) as caught:
        restore(folder, identity=other)
    assert "belongs to a different run (model.n_layer: 1 -> 2; optimizer.name: absent -> adamw);" in str(caught.value)
    assert snapshot(folder.parent) == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s | {"count": jnp.int16(0)}, "count: ['int32', []] -> ['int16', []]"),
        (lambda s: s | {"special": jnp.zeros(6)}, "special: ['float32', [5]] -> ['float32', [6]]"),
        (lambda s: s | {"extra": jnp.zeros(1)}, "extra: absent -> ['float32', [1]]"),
        (lambda s: {k: v for k, v in s.items() if k != "flags"}, "flags: ['bool', [3]] -> absent"),
    ],
)
def test_other_types_shapes_and_names_are_refused_not_cast(folder, change, says):
    before = snapshot(folder.parent)
    with pytest.raises(UserError) as caught:
        restore(folder, DataParallel(1).abstract(change(make_state(0))))
    assert f"30 holds other arrays than this run ({says})" in str(caught.value)
    assert snapshot(folder.parent) == before


def test_weights_of_another_run(folder, tmp_path):
    wanted = like()["params"]
    at_sign = Path(shutil.copytree(folder, tmp_path / "a@b" / "checkpoints")).parent
    sources = [(folder.parent, 30), (folder, 30), (f"{folder.parent}@10", 10), (at_sign, 30), (f"{at_sign}@20", 20)]
    for source, expected in sources:
        params, step, where = read_params(str(source), wanted)
        assert step == expected and where.name == str(expected)
        assert tree_sha256(params) == tree_sha256(make_state(expected)["params"])


def test_weights_that_cannot_be_had(folder, tmp_path):
    wanted = like()["params"]
    narrow = {**wanted, "gain": jax.ShapeDtypeStruct((30,), jnp.float32, sharding=wanted["gain"].sharding)}
    (folder / "20" / "manifest" / "metadata").write_text("{}")
    (tmp_path / "empty").mkdir()
    for source, like_params, says in [
        (tmp_path / "nowhere", wanted, "no checkpoint in .*nowhere; give a run's work directory"),
        (tmp_path / "empty", wanted, "no checkpoint in .*empty"),
        (f"{folder}@40", wanted, "has no checkpoint of step 40; it has 10, 20, 30"),
        (f"{folder}@newest", wanted, "no checkpoint in .*@newest; give a run's work directory as DIR or DIR@STEP"),
        (f"{folder}@20", wanted, r"20 is damaged: .*; choose another with .*@STEP"),
        (folder, narrow, r"do not fit config.model: params.gain: \['float32', \[31\]\] -> \['float32', \[30\]\]"),
    ]:
        with pytest.raises(UserError, match=says):
            read_params(str(source), like_params)
