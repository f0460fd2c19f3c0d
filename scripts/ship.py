"""Makes a policy that Esper ships of a run's checkpoint: esper/pretrained/NAME.pt, and its card NAME.md.

    python scripts/ship.py RUN_DIR_OR_CHECKPOINT [--name tamiyo_small] [--report REPORT_JSON] [--note TEXT]

Of a run directory the newest whole checkpoint is taken. What is kept: the policy's parameters, rounded to half
precision, the configuration of environment, policy and PPO, and a card with what it was trained on, the recipe, its
scores and its limits. The file has the container and the checksum of checkpoints.

Scores come from a report that `python -m trainers.evaluate` has written. To have them of the very file that is shipped:

    python scripts/ship.py RUN_DIR
    python -m trainers.evaluate checkpoint=tamiyo_small episodes=512
    python scripts/ship.py tamiyo_small --report runs/pretrained/tamiyo_small/digits/eval/report.json

Exit codes: 0 done, 2 bad input; nothing has been written then.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shlex
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

import esper
from envs.config import EnvConfig
from envs.making import saved_env_config
from esper.runtime import checkpoint
from esper.runtime.errors import ConfigError
from esper.tamiyo.loading import DEFAULT, PRETRAINED, load_policy, load_state, policy_of
from trainers import evaluation

FOLDER = Path(__file__).parents[1] / "esper" / PRETRAINED
LARGEST = 2_000_000  # bytes of a shipped policy
LOCAL = ("output_dir", "resume")  # overrides that are no part of a recipe


def rounded(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters in half precision, which halves the file and hardly changes the logits.

    Raises:
        ConfigError: there are numbers that are not finite, or too large for it.
    """
    found = {}
    for name, value in parameters.items():
        if not value.isfinite().all():
            raise ConfigError(f"{name} has numbers that are not finite; take a checkpoint from before that")
        found[name] = value.half()
        if not found[name].isfinite().all():
            raise ConfigError(f"{name} has numbers that are too large for half precision; such a policy is not shipped")
    return found


def fingerprint(parameters: dict[str, Tensor]) -> str:
    """By which a report and a card are known to be of the same parameters."""
    digest = hashlib.sha256()
    for name, value in parameters.items():
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def command(run_dir: Path) -> str | None:
    """The command line of a run, with what its last resumption has changed; None if the run does not tell."""
    lines = []
    for folder in (".hydra", ".hydra_resume"):
        try:
            overrides = yaml.safe_load((run_dir / folder / "overrides.yaml").read_text())
        except (OSError, yaml.YAMLError):
            continue
        kept = [each for each in map(str, overrides or []) if each.partition("=")[0].lstrip("+") not in LOCAL]
        lines.append(shlex.join(kept))
    if not lines:
        return None
    whole = f"python -m trainers.train {lines[0]}".rstrip()
    return f"{whole}  # resumed with {lines[1]}" if any(lines[1:]) else whole


def scores(path: Path, source: Path, digest: str) -> dict[str, Any]:
    """What goes on the card of a report of `trainers.evaluate`.

    Raises:
        ConfigError: there is none, or it is of another policy.
    """
    try:
        report = json.loads(path.read_text())
        label = report["checkpoint"]
        itself = label.endswith(f" {digest}")
        if not itself and Path(label).parts[-3:] != source.resolve().parts[-3:]:
            raise ConfigError(
                f"--report {path}: is of {label}, not of {source} or of its shipped parameters ({digest}); evaluate "
                "these first"
            )
        kept = {name: report[name] for name in ("environment", "episodes", "seed", "deterministic")}
        controllers = {
            name: {key: value for key, value in row.items() if key != "scores"}
            for name, row in report["controllers"].items()
        }
        table = [list(evaluation.HEADINGS), *(list(row) for row in evaluation.rows(report))]
        title = evaluation.title(report)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--report {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--report {path}: is no report.json of trainers.evaluate on a growth environment") from error
    of = "the shipped file" if itself else "the checkpoint, before it was rounded to half precision"
    legend = " ".join(line for line in evaluation.LEGEND if line)
    return {**kept, "of": of, "title": title, "table": table, "legend": legend, "controllers": controllers}


def limits(env: EnvConfig, recipe: dict[str, Any], schema_hash: str, measured: dict[str, Any] | None) -> list[str]:
    """What a user must not expect of it."""
    host = env.host
    found = [
        f"It has seen one environment, `{env.name}`: hosts of {host.stages[0]} to {host.stages[1]} stages that are "
        f"{host.width[0]} to {host.width[1]} wide, trained for {env.epochs} epochs. It runs on others, but how well "
        "has to be measured: `python -m trainers.evaluate checkpoint=... env=...`.",
        f"It has learned to choose among {', '.join(env.blueprints)}; other blueprints are strange to it.",
        "It is one run of one seed; another seed gives another policy.",
        "Its parameters are rounded to half precision, so its logits differ a little from those of the run.",
        f"It reads graphs of schema {schema_hash} and no others; a version of Esper with another schema refuses it.",
    ]
    if recipe["ppo"]["normalize_returns"]:
        found.append("Its values are in the scale that its training gave to returns, which is not kept.")
    if recipe["steps"] < recipe["ppo"]["total_steps"]:
        planned = f"{recipe['steps']:,} of {recipe['ppo']['total_steps']:,}"
        found.insert(0, f"Its training had not ended: it has seen {planned} steps.")
    if measured is None:
        found.insert(0, "It has not been evaluated.")
    return found


def page(card: dict[str, Any]) -> str:
    """The card for people."""
    name, on, recipe, measured = card["name"], card["trained_on"], card["recipe"], card["scores"]
    steps = f"{recipe['steps']:,} of {recipe['ppo']['total_steps']:,} environment steps"
    lines = [f"# {name}", ""]
    lines += [f"**Note: {card['note']}**", ""] if card["note"] else []
    lines += [
        "A policy of Esper's that decides whether, where and how a network grows while it trains:",
        f'`esper.load_policy("{name}")`. {recipe["parameters"]:,} parameters, graph schema `{card["schema_hash"]}`,',
        f"fingerprint `{card['fingerprint']}`. Written by `scripts/ship.py`, not by hand.",
        "",
        "## Trained on",
        "",
        f"- environment `{on['environment']}`, instances `{on['instances']}`, {on['epochs']} epochs an episode",
        "  (the data: [docs/data.md](../../docs/data.md))",
        f"- hosts of {on['stages'][0]} to {on['stages'][1]} stages, {on['width'][0]} to {on['width'][1]} wide",
        f"- blueprints: {', '.join(on['blueprints'])}",
        f"- contexts: {', '.join(f'{kind} {weight:g}' for kind, weight in on['contexts'].items())}",
        f"- reward: {', '.join(f'{key} {value}' for key, value in on['reward'].items())}",
        "",
        "## Recipe",
        "",
        "```",
        recipe["command"] or "(the run did not tell its command)",
        "```",
        "",
        f"Seed {recipe['seed']}, {steps}, Esper {recipe['esper']}, PyTorch {recipe['torch']}. Settings:",
        "",
        "| key | value |",
        "|---|---|",
        *(
            f"| `{part}.{key}` | {'null' if value is None else value} |"
            for part in ("warm_start", "ppo")
            for key, value in recipe[part].items()
        ),
        "",
        "## Scores",
        "",
    ]
    if measured is None:
        lines += ["It has not been evaluated."]
    else:
        how = "most probable actions" if measured["deterministic"] else "sampled actions"
        headings, *rows = measured["table"]
        lines += [f"Of {measured['of']}; {how}, seed {measured['seed']}. {measured['title']}.", ""]
        lines += [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
        lines += [*(f"| {' | '.join(row)} |" for row in rows), "", measured["legend"]]
    return "\n".join([*lines, "", "## Limits", "", *(f"- {limit}" for limit in card["limits"]), ""])


def make_card(
    name: str, note: str | None, source: Path, state: dict[str, Any], env: EnvConfig, report: Path | None
) -> dict[str, Any]:
    """The card of the policy in `state`, whose parameters are rounded; what a shipped one's has is kept."""
    config, earlier, parameters = state["config"], state.get("card", {}), state["learner"]["policy"]
    digest = fingerprint(parameters)
    recipe = earlier.get("recipe") or {
        "command": command(source.parent.parent if source.parent.name == checkpoint.FOLDER else source.parent),
        "seed": config["seed"],
        "steps": state["step"],
        "warm_start": config["warm_start"],
        "ppo": config["ppo"],
        "parameters": sum(value.numel() for value in parameters.values()),
        "esper": esper.__version__,
        "torch": str(torch.__version__),
    }
    measured = scores(report, source, digest) if report else earlier.get("scores")
    return {
        "name": name,
        "note": earlier.get("note", "") if note is None else note,
        "fingerprint": digest,
        "schema_hash": state["schema_hash"],
        "trained_on": {
            "environment": env.name,
            "instances": env.instances,
            "epochs": env.epochs,
            "stages": list(env.host.stages),
            "width": list(env.host.width),
            "blueprints": list(env.blueprints),
            "contexts": {kind: weight for kind, weight in env.contexts.mixture.weights().items() if weight > 0},
            "reward": asdict(env.reward),
        },
        "recipe": recipe,
        "scores": measured,
        "limits": limits(env, recipe, state["schema_hash"], measured),
    }


def cut_down(given: str, name: str, report: Path | None, note: str | None) -> dict[str, Any]:
    """The state of the shipped file.

    Raises:
        ConfigError: the policy or the report is not fit for it.
    """
    source, state = load_state(given, "checkpoint")
    config = state["config"]
    missing = [key for key in ("env", "policy", "warm_start", "ppo", "seed") if key not in config]
    if missing or "step" not in state:
        raise ConfigError(
            f"checkpoint={given}: does not say how it was trained (it has no {', '.join(missing or ['step'])})"
        )
    policy_of(state, origin=f"checkpoint={given}")
    try:
        env = saved_env_config(config["env"])
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"checkpoint={given}: its env is another version's ({reason}); train it anew") from error
    if not isinstance(env, EnvConfig):
        raise ConfigError(
            f"checkpoint={given}: was trained on env={env.name}; only policies that grow networks are shipped"
        )
    try:
        parameters = rounded(state["learner"]["policy"])
    except ConfigError as error:
        raise ConfigError(f"checkpoint={given}: {error}") from error
    state = {**state, "learner": {"policy": parameters}}
    return {
        "format_version": checkpoint.FORMAT_VERSION,
        "schema_hash": state["schema_hash"],
        "interface": None,  # of growth environments: this version's own
        "config": {
            "seed": config["seed"],
            "env": config["env"],
            "policy": {**config["policy"], "backend": "auto"},  # what suits the machine that loads it
            "warm_start": config["warm_start"],
            "ppo": config["ppo"],
        },
        "step": state["step"],
        "learner": state["learner"],
        "card": make_card(name, note, source, state, env, report),
    }


def ship(given: str, name: str = DEFAULT, report: Path | None = None, note: str | None = None) -> Path:
    """Writes the policy of a run, a checkpoint or a shipped policy to FOLDER, with its card; returns its path.

    Raises:
        ConfigError: the policy or the report is not fit for it.
        OSError: files could not be written.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == PRETRAINED:
        raise ConfigError(f"--name {name}: use small letters, digits and _, and not {PRETRAINED}")
    state = cut_down(given, name, report, note)
    with tempfile.TemporaryDirectory() as scratch:
        trial = Path(scratch) / f"{name}.pt"
        checkpoint.write(trial, state)
        if (size := trial.stat().st_size) > LARGEST:
            raise ConfigError(f"checkpoint={given}: would be {size:,} bytes; at most {LARGEST:,} are shipped")
        load_policy(trial)
    text, path = page(state["card"]), FOLDER / f"{name}.pt"
    path.parent.mkdir(exist_ok=True)
    checkpoint.write(path, state)
    path.with_suffix(".md").write_text(text)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run directory, a checkpoint file, or the name of a shipped policy")
    parser.add_argument("--name", default=DEFAULT, help=f"default: {DEFAULT}")
    parser.add_argument("--report", type=Path, help="report.json of trainers.evaluate, for the card's scores")
    parser.add_argument("--note", help="a line at the top of the card")
    given = parser.parse_args()
    try:
        path = ship(given.checkpoint, given.name, given.report, given.note)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error.filename or FOLDER}: {error.strerror or error}", file=sys.stderr)
        return ConfigError.exit_code
    print(f"{path} ({path.stat().st_size:,} bytes) and {path.with_suffix('.md').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
