import hashlib
import os
import pickle
import random

import numpy as np
import pytest
import torch

from esper.runtime import checkpoint
from esper.runtime.checkpoint import CheckpointError

STATE = {"weights": torch.arange(6.0).view(2, 3), "step": 7, "names": ["a", "b"], "nested": {"x": 1.5, "none": None}}


def test_round_trip(tmp_path):
    path = checkpoint.save(tmp_path, 7, STATE, keep=3)
    state = checkpoint.read(path)
    assert torch.equal(state.pop("weights"), STATE["weights"])
    assert state == {
        "format_version": checkpoint.FORMAT_VERSION,
        "step": 7,
        "names": ["a", "b"],
        "nested": STATE["nested"],
    }


def test_the_newest_are_kept_by_step_and_not_by_text(tmp_path):
    for step in (5, 100, 20, 3_000_000):
        checkpoint.save(tmp_path, step, STATE, keep=2)
    assert [path.name for path in checkpoint.found(tmp_path)] == ["step_000003000000.ckpt", "step_000000000100.ckpt"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "foreign"])
def test_damage_is_found_and_the_one_before_is_used(tmp_path, damage):
    checkpoint.save(tmp_path, 1, {**STATE, "step": 1}, keep=3)
    path = checkpoint.save(tmp_path, 2, {**STATE, "step": 2}, keep=3)
    content = path.read_bytes()
    flipped = content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]
    path.write_bytes({"truncate": content[:-10], "flip": flipped, "empty": b"", "foreign": b"PK" + content}[damage])
    with pytest.raises(CheckpointError, match=path.name):
        checkpoint.read(path)
    _, state, problems = checkpoint.latest(tmp_path)
    assert state["step"] == 1
    assert len(problems) == 1
    assert str(path) in problems[0]


def test_none_left(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoint.latest(tmp_path)
    checkpoint.save(tmp_path, 1, STATE, keep=1).write_bytes(b"")
    with pytest.raises(CheckpointError, match="is not an Esper checkpoint"):
        checkpoint.latest(tmp_path)


def test_the_best_is_a_copy_that_outlives_its_file_and_serves_when_no_other_is_whole(tmp_path):
    best = checkpoint.save(tmp_path, 1, {**STATE, "step": 1}, keep=1)
    checkpoint.keep_as_best(best)
    newest = checkpoint.save(tmp_path, 2, {**STATE, "step": 2}, keep=1)
    assert not best.exists()
    assert checkpoint.found(tmp_path) == [newest]
    assert checkpoint.latest(tmp_path)[1]["step"] == 2
    newest.write_bytes(b"")
    path, state, problems = checkpoint.latest(tmp_path)
    assert (path.name, state["step"], len(problems)) == (checkpoint.BEST, 1, 1)


@pytest.mark.parametrize("payload", [b"", b"not a file of torch's", b"PK\x03\x04" + bytes(100)])
def test_a_payload_that_is_none_of_torchs_is_refused(tmp_path, payload):
    path = tmp_path / "step_1.ckpt"
    path.write_bytes(checkpoint._MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)
    with pytest.raises(CheckpointError, match=r"step_1\.ckpt"):
        checkpoint.read(path)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_code_in_a_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Whole and with a right checksum: only weights_only=True stands between it and the user.
    path = checkpoint.save(tmp_path, 1, {"evil": Evil()}, keep=1)
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        checkpoint.read(path)
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Evil()))  # it would have worked
    assert (tmp_path / "executed").exists()


def test_other_format_version(tmp_path, monkeypatch):
    path = checkpoint.save(tmp_path, 1, STATE, keep=1)
    written = checkpoint.FORMAT_VERSION
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 99)
    with pytest.raises(CheckpointError, match=rf"format version {written}, this version of Esper reads 99"):
        checkpoint.read(path)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = checkpoint.save(tmp_path, 1, STATE, keep=1)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("broken")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="broken"):
        checkpoint.save(tmp_path, 1, {"step": 8}, keep=1)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_all_three_generators_go_on_where_they_were(tmp_path):
    random.gauss(0, 1)  # leaves a cached second value behind
    np.random.normal()
    path = checkpoint.save(tmp_path, 1, {"rng": checkpoint.rng_state()}, keep=1)

    def draw():
        return random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand(), torch.rand(3).tolist()

    expected = draw()
    draw()
    checkpoint.set_rng_state(checkpoint.read(path)["rng"])
    assert draw() == expected
