"""docs/configuration.md: every key, from the schemas, their comments and checks, and the files of conf/.

python scripts/config_reference.py            # writes it
python scripts/config_reference.py --check    # exit code 1 where it is not up to date

What is allowed is what the checks say: each key is set to values that few allow, and their refusal is quoted.
"""

import argparse
import ast
import dataclasses
import inspect
import io
import itertools
import re
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize_config_module
from omegaconf import MISSING, OmegaConf

from envs.making import CONFIGS
from esper.runtime.errors import ConfigError, EsperError
from esper.tamiyo import baselines, export
from trainers.config import BenchmarkConfig, EvaluateConfig, ExportConfig, TrainConfig, register

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "configuration.md"
CONF = ROOT / "conf"

HEAD = """\
# Every key of the configuration

Written by `python scripts/config_reference.py`; do not edit it.

All keys are Hydra overrides, `KEY=VALUE`; groups are chosen by `GROUP=OPTION`. `--help` of each command prints them
with their present values. A key that does not exist, or a value that is not allowed, is refused in one line with exit
code 2. Types are those of the schemas; `or null` means that `null` stands for something, too. Where *allowed* is empty,
nothing is checked but the type. Defaults are those of the command with `env=digits recipe=none`; the `recipe` of an
environment (of its name, where there is one), an `experiment` or another option of a group may set others.
"""

_SUITE = re.compile(r'^@suite\("(\w+)"\)', re.MULTILINE)


# What no check can say, since the values are names of files, devices and the like.
ALLOWED = {
    "env.contexts.regimes.N.train_size": "[low, high], at most the task's training samples",
    "evaluation.controllers.*.blueprint": "one of env.blueprints",
    "ppo.minibatches": "above 0, at most ppo.num_steps * env.num_envs",
    "policy.hidden": "above 0, one for each layer",
    "policy.heads": "must divide the widths of the GAT layers",
    "policy.convolutions": "sage, gat; one for each width",
    "benchmark.tasks": "files of conf/env",
    "evaluation.baselines": f"all, none, or names of {', '.join(baselines.NAMES)}",
    "runtime.device": "a device of PyTorch's: cpu, cuda, cuda:1, mps ...",
    "runtime.actor_device": "as runtime.device",
    "policy.name": "any name",
    "env.name": "any name",
    "env.kind": "set by the environment",
    "env.dynamics": "trained, surrogate",
    "resume": "a run directory",
    "init": "a run directory, a checkpoint file or a shipped policy",
    "checkpoint": "a run directory, a checkpoint file or a shipped policy",
    "output_dir": "a directory",
    "out": "a file",
    "compare": "a report of this command",
    "against": "a report of this command",
    "format": ", ".join(export.FORMATS),
    "suite": ", ".join(
        sorted(
            name for path in (ROOT / "trainers/benchmarks").glob("*.py") for name in _SUITE.findall(path.read_text())
        )
    ),
    "env.target": "package.module:factory",
    "env.id": "an id of Gymnasium's",
    "env.action_node": "a node type of the environment",
}
# Of fields that have no comment of their own; "*" stands for one part of a key.
MEANING = {
    "seed": "fixes everything that is drawn; on one machine and thread count a run is the same bit for bit",
    "ppo.lr": "learning rate of Adam, at the start",
    "ppo.gamma": "discount of rewards; 1, since only the end of an episode counts",
    "ppo.gae_lambda": "of generalised advantage estimation (arXiv 1506.02438); less trusts the critic more",
    "ppo.entropy_coef": "weight of the entropy in the loss; more explores longer",
    "ppo.value_coef": "weight of the critic's squared error in the loss",
    "ppo.max_grad_norm": "gradients of a larger norm are scaled down to it",
    "runtime.device": "where the policy is trained and hosts are kept",
    "evaluation.seed": "chooses the held-out instances",
    "evaluation.controllers.*.blueprint": "what it germinates",
    "evaluation.controllers.*.first": "the first epoch it may act in, counted from 0",
    "evaluation.controllers.*.every": "epochs between two decisions",
    "evaluation.controllers.*.slot": "where it germinates, counted from 0",
    "evaluation.controllers.*.epoch": "when it germinates, counted from 0",
    "env.kind": "which class of configuration this is",
    "env.blueprints": "what can be germinated",
    "env.task": "the data, see [data](data.md)",
    "env.learning_rate": "of the hosts, drawn per episode, log-uniform",
    "env.training.steps_per_epoch": "minibatches of an epoch",
    "env.training.batch_size": "samples of a minibatch",
    "env.training.beta1": "of the hosts' Adam: decay of the running mean of gradients",
    "env.training.beta2": "of the hosts' Adam: decay of the running mean of their squares",
    "env.training.epsilon": "of the hosts' Adam: added to the root of that mean",
    "env.host.width": "units of a stage, drawn per episode from [low, high]",
    "env.host.stages": "stages of a host, drawn per episode from [low, high]; each has a slot behind it",
    "env.contexts.regimes": "kinds of training data, one of which an episode draws: a list of the keys below",
    "env.contexts.regimes.N.weight": "how often this one is drawn, in relation to the others",
    "env.contexts.mixture.*": "weight of contexts of this kind",
    "env.contexts.*.defects": "weight of each defect",
    "env.contexts.*.decoys": "share of the other stages that are unusual but benign",
    "env.contexts.*.window": "when it happens, drawn from [low, high], in episodes",
    "env.contexts.*.seeds": "germinations allowed",
    "env.contexts.growth.width": "units of a stage in these contexts, drawn from [low, high]",
    "suite": "what is measured",
    "benchmark.repeats": "times that everything is measured; medians are reported",
}
VARIABLES = {
    "ESPER_TORCH_SCATTER": "0: torch-scatter is not used where it is installed",
    "ESPER_ATTENTION_BACKEND": "the backend of attention where `runtime.attention=auto`, see [attention](attention.md)",
    "XDG_CACHE_HOME": "where `esper/`, the folder of compiled native code, lies; default `~/.cache`",
    "CXX": "the C++ compiler of native code",
}
OPTIONS = {
    "policy=tamiyo": "layers of 256, 256, 128 and 128 units",
    "policy=tamiyo_small": "layers of 64 units",
    "ppo=default": "the settings below",
    "runtime=cpu": "fp32, compiled",
    "runtime=cuda": "bf16, compiled",
    "runtime=mps": "Apple's GPUs: fp32, not compiled",
}
KINDS = {
    "growth": "`env=digits`, `segment`, `digits_conv`, `signal`, `mnist5k`, `charlm` and `surrogate`; see "
    "[environments](environments.md).",
    "super_resolution": "`env=super_resolution`; see [super-resolution](super_resolution.md).",
    "gym": "`env=gym`; see [your own environment](your_own_environment.md).",
    "hetero": "`env=hetero`; see [your own environment](your_own_environment.md).",
}
EXAMPLES = {"gym": ["env.id=CartPole-v1"], "hetero": ["env.target=package.module:factory"]}


class Row(NamedTuple):
    """A key."""

    key: str
    type: str
    default: str
    meaning: str
    allowed: str


# ---- the schemas -----------------------------------------------------------------------------------------------------


def meanings(kind: type) -> dict[str, str]:
    """What the fields of a dataclass mean: the comment beside each, or else what `Attributes:` says."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(each):
            continue
        found |= _attributes(inspect.getdoc(each) or "") if "__doc__" in vars(each) else {}
        try:
            source = textwrap.dedent(inspect.getsource(each))
        except (OSError, TypeError):  # made by make_dataclass
            continue
        comments = {
            token.start[0]: token.string.lstrip("# ")
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT and "type: ignore" not in token.string
        }
        for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                beside = " ".join(comments[line] for line in lines if line in comments)
                found |= {node.target.id: beside} if beside else {}
    return found


def _attributes(doc: str) -> dict[str, str]:
    found = {}
    _, _, section = doc.partition("Attributes:\n")
    for match in re.finditer(r"^    (\w[\w, ]*): (.*(?:\n {8,}.*)*)", section, flags=re.MULTILINE):
        text = " ".join(match[2].split()).rstrip(".")
        found |= {name.strip(): text for name in match[1].split(",")}
    return found


def comments_of(path: Path) -> dict[str, str]:
    """key -> the comment beside it, of a YAML file."""
    found, parents = {}, [(-1, "")]
    for line in path.read_text().splitlines():
        if not (match := re.match(r"( *)(\w+):(.*)", line)):
            continue
        indent = len(match[1])
        while parents[-1][0] >= indent:
            parents.pop()
        key = f"{parents[-1][1]}{match[2]}"
        parents.append((indent, f"{key}."))
        if beside := re.search(r"(?:^| )# (.*)$", match[3]):
            found[key] = beside[1]
    return found


def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _plain(hint: Any) -> tuple[Any, bool]:
    """A type without None, and whether it was there."""
    members = (
        typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else ()
    )
    others = [member for member in members if member is not type(None)]
    return (others[0], True) if members and len(others) == 1 else (hint, False)


def _type_name(hint: Any) -> str:
    hint, optional = _plain(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        name = "any"
    elif origin is list:
        name = f"list of {_type_name(arguments[0])}"
    elif origin is dict:
        name = "mapping" if arguments[1] is Any else f"mapping of names to {_type_name(arguments[1])}"
    else:
        name = "mappings" if dataclasses.is_dataclass(hint) else hint.__name__
    return f"{name} or null" if optional else name


def leaves(kind: type, prefix: str) -> Iterator[tuple[str, Any, str]]:
    """(key, type, meaning) of everything that can be set."""
    hints, said = _hints(kind), meanings(kind)
    # Sections after what stands by itself, as in a page.
    fields = sorted(dataclasses.fields(kind), key=lambda field: dataclasses.is_dataclass(_plain(hints[field.name])[0]))
    for field in fields:
        key, hint = f"{prefix}{field.name}", hints[field.name]
        plain, _ = _plain(hint)
        if field.name in baselines.REGISTRY and key.startswith("evaluation.controllers."):
            for name, own, meaning in leaves(typing.cast(type, baselines.REGISTRY[field.name][1]), f"{key}."):
                yield name, own | None, meaning
        elif dataclasses.is_dataclass(plain):
            yield from leaves(typing.cast(type, plain), f"{key}.")
        else:
            yield key, hint, said.get(field.name, "")
            item = typing.get_args(plain)
            if item and dataclasses.is_dataclass(item[0]):
                yield from leaves(typing.cast(type, item[0]), f"{key}.N.")


# ---- the checks ------------------------------------------------------------------------------------------------------


def _set(node: Any, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for name in parents:
        node = node[int(name)] if isinstance(node, list) else getattr(node, name)
    setattr(node, last, value)


def _matching(texts: dict[str, str], key: str) -> str:
    *others, last = key.split(".")
    patterns = [key, ".".join([*others, "*"]), ".".join([*others[:-1], "*", last])]
    return next((texts[pattern] for pattern in patterns if pattern in texts), "")


def _refusal(config: Any, key: str, value: Any) -> str | None:
    """Why a value is not allowed, or None."""
    changed = deepcopy(config)
    _set(changed, key, value)
    try:
        changed.validate()
    except ConfigError as error:
        text = str(error)
        # Not where the checks have tripped over something else.
        return text.split(": ", 1)[1] if re.match(rf"{re.escape(key)}\b", text) and ": " in text else None
    except (EsperError, KeyError, TypeError, ValueError, RuntimeError):
        return None
    return None


def allowed(config: Any, key: str, hint: Any) -> str:
    """What the checks of `config` let pass."""
    if told := _matching(ALLOWED, re.sub(r"\.\d+\.", ".N.", key)):
        return told
    plain, _ = _plain(hint)
    item = typing.get_args(plain)
    if plain is bool:
        return "true, false"
    trials: list[Any] = []
    if plain in (int, float):
        trials = [-1, 1 << 40] if plain is int else [-1.0, 1e12]
    elif plain is str:
        trials = ["?"]
    elif typing.get_origin(plain) is list and not dataclasses.is_dataclass(item[0]):
        trials = [["?"]] if item[0] is str else [[-1, -2]]
    elif typing.get_origin(plain) is dict and item[1] is float:
        trials = [{"?": 1.0}]
    said = [text for trial in trials if (text := _refusal(config, key, trial))]
    if plain is str or (item and str in item):
        said = [text.split("; ")[-1] for text in said]
    said = [re.sub(r"^(must be|must lie|choose one of|choose from|choose|give one of) ", "", text) for text in said]
    said = [re.sub(r"^must not be negative", "0 or more", text) for text in said]
    said = [re.sub(r"^give (a share )?|^numbers of hosts |^sizes |[()]", "", text) for text in said]
    said = [re.sub(r"^must be ", "", text) for text in said]
    return "; ".join(dict.fromkeys(said))


# ---- the page --------------------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A value as it is written in an override."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {shown(each)}' for key, each in value.items())}}}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def table(rows: list[Row]) -> str:
    """In Markdown."""
    lines = ["| key | type | default | meaning | allowed |", "|---|---|---|---|---|"]
    for row in rows:
        cells = _code(row.key), row.type, _code(row.default), row.meaning, row.allowed
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|').replace('<', '&lt;') for cell in cells)} |")
    return "\n".join(lines)


def composed(name: str, overrides: list[str]) -> Any:
    """The configuration of a command."""
    register()
    with initialize_config_module("esper.conf", version_base="1.3"):
        return compose(name, overrides)


def rows_of(
    kind: type, prefix: str, given: Any, checked: Any, beside: dict[str, str], skip: tuple[str, ...] = ()
) -> list[Row]:
    """Of all keys below `prefix`.

    Args:
        kind: the schema.
        prefix: in front of its fields.
        given: the composed configuration.
        checked: the same as an object with `validate`.
        beside: comments of the YAML file, for fields without one.
        skip: fields that are described elsewhere.
    """
    rows = []
    for key, hint, meaning in leaves(kind, prefix):
        if key.removeprefix(prefix).split(".")[0] in skip:
            continue
        place = key.replace(".N.", ".0.")
        node = OmegaConf.to_container(given, resolve=False)
        for part in place.split("."):
            node = node[int(part)] if isinstance(node, list) else node[part]
        default = "" if node == MISSING else shown(node)
        if isinstance(node, list) and node and isinstance(node[0], dict):
            default = ""  # its parts have rows of their own
        needed = " (must be given)" if node == MISSING else ""
        meaning = meaning.replace("None", "null") or beside.get(key.removeprefix(prefix), "") or _matching(MEANING, key)
        rows.append(Row(key, _type_name(hint), default, f"{meaning}{needed}", allowed(checked, place, hint)))
    return rows


def train_sections() -> Iterator[tuple[str, str, list[Row]]]:
    """(title, text, rows) of `trainers.train`."""
    given = composed("train", ["recipe=none"])
    config = OmegaConf.to_object(given)
    beside = comments_of(CONF / "train.yaml")
    parts = [field.name for field in dataclasses.fields(TrainConfig)]
    single = [part for part in parts if not OmegaConf.is_config(given[part])]
    others = tuple(part for part in parts if part not in single)
    yield "The run", "", rows_of(TrainConfig, "", given, config, beside, others)
    for part, text in {
        "ppo": "PPO; the update. See [metrics](metrics.md) for what to watch when changing them.",
        "policy": "Tamiyo.",
        "warm_start": "What Tamiyo learns by regression before PPO; see [results](results.md).",
        "runtime": "Where and how it runs, of all commands.",
        "checkpoint": "When the state of a run is saved; see [recovery](recovery.md).",
        "evaluation": "The comparison after training. `python -m trainers.evaluate` has these keys without the prefix.",
    }.items():
        kind = _hints(TrainConfig)[part]
        near = (
            comments_of(CONF / part / f"{'default' if part == 'ppo' else 'cpu'}.yaml")
            if part in ("ppo", "runtime")
            else {}
        )
        near = comments_of(CONF / "policy" / "tamiyo_small.yaml") if part == "policy" else near
        near |= {key.removeprefix(f"{part}."): text for key, text in beside.items() if key.startswith(f"{part}.")}
        yield f"{part}", text, rows_of(kind, f"{part}.", given, config, near)


def env_sections() -> Iterator[tuple[str, str, list[Row]]]:
    """(title, text, rows) of each kind of environment."""
    for name, kind in CONFIGS.items():
        file = "digits" if name == "growth" else name
        given = composed("train", [f"env={file}", *EXAMPLES.get(name, [])])
        rows = rows_of(kind, "env.", given, OmegaConf.to_object(given), comments_of(CONF / "env" / f"{file}.yaml"))
        example = EXAMPLES.get(name, [""])[0].split("=")[0]
        rows = [
            row._replace(default="", meaning=f"{row.meaning} (must be given)") if row.key == example else row
            for row in rows
        ]
        yield f"env, of the kind {name}", KINDS[name], rows


def _first_comment(path: Path) -> str:
    head = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    text = "\n".join(line[2:] for line in head if "@package" not in line)
    sentence = re.split(r"(?<=\w)\.(?=\s|$)|\n(?=[A-Z])", text)[0].replace("\n", " ")
    return sentence or OPTIONS.get(f"{path.parent.name}={path.stem}", "")


def groups() -> str:
    """Every group and its options."""
    lines = ["| option | what it is |", "|---|---|"]
    for folder in ("env", "env/contexts", "policy", "ppo", "runtime", "recipe", "experiment"):
        for path in sorted((CONF / folder).glob("*.yaml")):
            lines.append(f"| `{folder}={path.stem}` | {_first_comment(path)} |")
    return "\n".join(lines)


def environments() -> str:
    """What the files of growth environments set, one column each."""
    kind = CONFIGS["growth"]
    names = [p.stem for p in sorted((CONF / "env").glob("*.yaml")) if "growth_schema" in p.read_text()]
    configs = {name: OmegaConf.to_container(composed("train", [f"env={name}"]))["env"] for name in names}  # type: ignore[index,call-overload]
    lines = [f"| key | {' | '.join(f'`{name}`' for name in names)} |", f"|---{'|---' * len(names)}|"]
    for key, _, _ in leaves(kind, ""):
        if ".N." in key or key == "contexts.regimes":
            continue
        values = []
        for name in names:
            node: Any = configs[name]
            for part in key.split("."):
                node = node[part]
            values.append(shown(node))
        if len(set(values)) > 1 and key not in ("name", "task"):
            lines.append(f"| `env.{key}` | {' | '.join(f'`{value}`' for value in values)} |")
    return "\n".join(lines)


def other_sections() -> Iterator[tuple[str, str, list[Row]]]:
    """(title, text, rows) of the other commands."""
    with_runtime = "and the keys of [`runtime`](#runtime)"
    own = tuple(field.name for field in dataclasses.fields(_hints(TrainConfig)["evaluation"]))
    rows = rows_of(
        EvaluateConfig,
        "",
        composed("evaluate", []),
        _Unchecked(),
        comments_of(CONF / "evaluate.yaml"),
        (*own, "runtime", "env"),
    )
    text = (
        f"The keys of [`evaluation`](#evaluation) without the prefix, {with_runtime}. `env=NAME` evaluates on another "
        "environment than the one that the policy was trained on, with that environment's keys."
    )
    yield "python -m trainers.evaluate", text, rows
    yield (
        "python -m trainers.export",
        "See [export](export.md).",
        rows_of(ExportConfig, "", composed("export", []), _Unchecked(), comments_of(CONF / "export.yaml")),
    )
    given = composed("benchmark", ["out=benchmark.json"])
    rows = rows_of(
        BenchmarkConfig, "", given, OmegaConf.to_object(given), comments_of(CONF / "benchmark.yaml"), ("runtime",)
    )
    default = "benchmarks/SUITE/TIME.json"
    rows = [row._replace(default=default) if row.key == "out" else row for row in rows]
    yield "python -m trainers.benchmark", f"See [benchmarks](benchmark.md); {with_runtime}.", rows


class _Unchecked:
    """Stands for configurations that commands check when they use them."""

    def __deepcopy__(self, memo: Any) -> "_Unchecked":
        return _Unchecked()

    def validate(self) -> None:
        """Lets everything pass."""


def sections() -> list[tuple[str, str, list[Row]]]:
    """(title, text, rows) of the whole page."""
    return [*train_sections(), *env_sections(), *other_sections()]


def page(found: list[tuple[str, str, list[Row]]]) -> str:
    """The page."""
    parts = [HEAD, "## Groups\n", groups()]
    for title, text, rows in found:
        parts.append(f"\n## {title}\n")
        parts += [f"{text}\n"] if text else []
        parts.append(table(rows))
        if title == "env, of the kind growth":
            parts += ["\n### What its files set\n", environments()]
    parts += ["\n## Environment variables\n", "| variable | meaning |", "|---|---|"]
    parts += [f"| `{name}` | {text} |" for name, text in VARIABLES.items()]
    return "\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(argv).check
    found = sections()
    bare = [row.key for _, _, rows in found for row in rows if not row.meaning]
    if bare:
        print(
            f"error: nothing says what these mean: {', '.join(bare)}; write a comment beside each field",
            file=sys.stderr,
        )
        return 1
    text = page(found)
    if check:
        if PAGE.read_text() != text:
            print(f"error: {PAGE.name} is not up to date; run python scripts/config_reference.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
