"""`python -m trainers.export`, and its files in processes that know nothing of Esper."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from envs.config import load_config
from envs.growth_env import GrowthEnv
from esper.graph import GraphBatch
from esper.tamiyo import export, loading
from esper.tamiyo.actor import Actor
from trainers import export as command
from trainers import train

from .conftest import TINY, call

# Of other sizes than those that were traced with, and than each other; among them one graph of one slot and blueprint.
GRAPHS = {
    "few": ("digits", 3, {"host": {"width": [8, 8], "stages": [3, 3]}}),
    "wide": ("digits", 5, {"host": {"width": [12, 16], "stages": [4, 6]}}),
    "one": ("digits", 1, {"host": {"width": [4, 4], "stages": [1, 1]}, "blueprints": ["mlp"]}),
    "segment": ("segment", 2, {"host": {"width": [6, 6], "stages": [2, 2]}}),
}
READ = {
    "torch_export": """
import torch
extra = {"metadata.json": ""}
program = torch.export.load(sys.argv[1], extra_files=extra).module()
metadata = json.loads(extra["metadata.json"])
def run(inputs):
    return [each.numpy() for each in program({name: torch.from_numpy(inputs[name]) for name in metadata["inputs"]})]
""",
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
metadata = json.loads(session.get_modelmeta().custom_metadata_map["esper"])
def run(inputs):
    return session.run(metadata["outputs"], {name: inputs[name] for name in metadata["inputs"]})
""",
}
PROCESS = """
import json, pathlib, sys
import numpy as np
{read}
for file in sys.argv[2:]:
    log_probs, actions, values = run(np.load(file))
    np.savez(pathlib.Path(file).with_suffix(".out.npz"), log_probs=log_probs, actions=actions, values=values)
known = [name for name in sys.modules if name.partition(".")[0] in ("esper", "envs", "trainers", "torch_geometric")]
print(json.dumps({{"metadata": metadata, "known": known}}))
"""


@pytest.fixture
def run_export(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    return lambda *overrides: call(command.main, overrides, monkeypatch, capsys)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose policy has a layer of each kind, and no more, for each takes seconds to trace."""
    folder = tmp_path_factory.mktemp("exported")
    layers = "policy.hidden=[16,16]", "policy.convolutions=[sage,gat]", "policy.heads=4", "ppo.lr=0.01"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["esper", *TINY, *layers])
        with pytest.raises(SystemExit) as exit:
            train.main()
    assert not exit.value.code
    (found,) = (folder / "runs" / "digits").iterdir()
    return found


@pytest.fixture(scope="module")
def traced():
    """`program_of` that traces the one policy of this module once: formats differ in what they make of its program."""
    programs = []

    def program_of(policy, interface):
        if not programs:
            programs.append(original(policy, interface))
        return programs[0]

    original = export.program_of
    return program_of


@pytest.mark.slow
@pytest.mark.timeout(1200)  # tracing takes minutes on a busy machine
@pytest.mark.parametrize("form", export.FORMATS)
def test_a_file_acts_as_the_checkpoint_where_there_is_no_esper(form, run, traced, run_export, tmp_path, monkeypatch):
    if form == export.ONNX and find_spec("onnxruntime") is None:
        pytest.skip("onnxruntime is not installed")
    monkeypatch.setattr(export, "program_of", traced)
    file = tmp_path / "exported" / f"policy{export.ENDINGS[form]}"
    result = run_export(f"checkpoint={run}", f"format={form}", f"out={file}")
    assert result.code == 0, result.err
    actor = Actor(loading.load_policy(run), deterministic=True)
    expected = {}
    for name, (env, hosts, overrides) in GRAPHS.items():
        graph = observed(env, hosts, overrides)
        decision, log_probs = actor(graph), actor.policy.evaluate(graph)[0].log_probs
        expected[name] = {"actions": decision.actions, "log_probs": log_probs.detach(), "values": decision.values}
        np.savez(tmp_path / f"{name}.npz", **{key: value.numpy() for key, value in export.inputs_of(graph).items()})
    files = [str(tmp_path / f"{name}.npz") for name in GRAPHS]
    code = PROCESS.format(read=READ[form])
    done = subprocess.run([sys.executable, "-c", code, str(file), *files], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["known"] == []
    assert said["metadata"]["schema_hash"] == loading.load_state(run)[1]["schema_hash"]
    assert said["metadata"]["trained_on"]["environment"] == "digits"
    for name, outputs in expected.items():
        found = np.load(tmp_path / f"{name}.out.npz")
        assert found["actions"].tolist() == outputs["actions"].tolist(), name
        for key in ("log_probs", "values"):
            np.testing.assert_allclose(found[key], outputs[key].numpy(), rtol=1e-4, atol=1e-5, err_msg=f"{name} {key}")


def observed(env: str, hosts: int, overrides: dict) -> GraphBatch:
    """The observation after three random actions."""
    training = {"steps_per_epoch": 2, "batch_size": 8}
    made = GrowthEnv(load_config(env, training=training, **overrides), hosts)
    generator = torch.Generator().manual_seed(1)
    graph = made.reset(torch.arange(hosts))
    for _ in range(3):
        graph = made.step(torch.multinomial(graph.action_mask.float(), 1, generator=generator).squeeze(1))[0]
    return graph


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint=nowhere", "out=a.pt2"], "checkpoint=nowhere: no such file or directory"),
        (["checkpoint=tamiyo_small"], "out: must be given as out=VALUE"),
        (
            ["checkpoint=tamiyo_small", "out=a", "format=tflite"],
            "format=tflite: no such format; choose torch_export or",
        ),
        (["checkpoint=tamiyo_small", "out=a.onnx"], "out=a.onnx: must end in .pt2 with format=torch_export"),
        (["checkpoint=tamiyo_small", "ou=a"], "ou: no such key; did you mean out?"),
    ],
)
def test_bad_input(run_export, overrides, message):
    result = run_export(*overrides)
    assert result.code == 2
    assert result.err.startswith(f"error: {message}"), result.err
    assert len(result.err.splitlines()) == 1
    assert not list(Path.cwd().iterdir())
