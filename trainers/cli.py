"""What the entry points share: running under Hydra, and one line and an exit code for everything that goes wrong."""

from __future__ import annotations

import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from esper.runtime import launch
from esper.runtime.errors import ConfigError, EsperError, Preempted, TrainingError

_Job = Callable[[DictConfig], Any]


def job(schema: type) -> Callable[[_Job], _Job]:
    """Decorator for what stands under `hydra.main`: refuses keys that `schema` does not have, and ends the process
    with one line and an exit code on an EsperError, before Hydra adds lines of its own. Under a sweep a TrainingError
    goes to the sweeper instead, to which a run that fails is a result; every other error ends the sweep."""

    def wrap(function: _Job) -> _Job:
        @functools.wraps(function)
        def wrapped(given: DictConfig) -> Any:
            try:
                try:
                    _check_keys(given, schema)
                    return function(given)
                except OmegaConfBaseException as error:
                    raise ConfigError(explain(error, schema)) from error
            except EsperError as error:
                if HydraConfig.get().mode == RunMode.MULTIRUN and isinstance(error, TrainingError):
                    raise
                sys.exit(_fail(str(error), error.exit_code))

        return wrapped

    return wrap


def run(entry: Callable[[], None], schema: type) -> int:
    """Runs a `hydra.main` entry point; returns its exit code.

    Args:
        entry: the decorated function.
        schema: dataclass of its configuration, for suggestions.
    """
    # Otherwise Hydra prints its own multi-line messages and exits with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        entry()
    except TrainingError as error:  # of a run of a sweep
        return _fail(str(error), error.exit_code)
    except (HydraException, OmegaConfBaseException) as error:
        own = next((e for e in _chain(error) if isinstance(e, EsperError)), None)
        if own is not None:
            return _fail(str(own), own.exit_code)
        return _fail(explain(error, schema), ConfigError.exit_code)
    except BrokenPipeError:
        # Python writes what is left once more when it ends, which would be another error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _fail("whoever read what is printed has gone; print to a file instead", ConfigError.exit_code)
    except OSError as error:
        # The loop turns its own into TrainingError; what is left comes from reading input or making folders.
        hint = "choose another output_dir, or mend the path"
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}; {hint}", ConfigError.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted; checkpoints that were saved before are kept", 130)
    return 0


def console() -> Console:
    """Where results are printed: as wide as the terminal, and wide enough for the tables where there is none. Of
    several processes the first one alone prints."""
    return Console(width=None if sys.stdout.isatty() else 110, quiet=launch.rank() > 0)


def _fail(message: str, code: int) -> int:
    sys.stdout.flush()
    if launch.rank() == 0 or code != Preempted.exit_code:  # to which all processes come, and have one thing to say
        print(f"error: {message}", file=sys.stderr)
    return code


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def explain(error: Exception, schema: type) -> str:
    """One line for an error of Hydra's or OmegaConf's that names the key, the value and the remedy."""
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not of the form KEY=VALUE; see --help for the keys"
    text = "\n".join(str(each) for each in _chain(error))
    if match := re.search(r"Could not find '([\w/]+)/([^']+)'", text):
        group, option = match.groups()
        options = re.findall(r"^\t(\S+)$", text, flags=re.MULTILINE)
        return f"{group}={option}: no such option; choose one of {', '.join(options)}"
    key = re.search(r"full_key: (\S+)", text)
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown or (key and re.search(r"Key '.*' (is )?not in", text)):
        name = unknown[1] if unknown else key[1] if key else ""
        return _unknown(name, schema)
    if match := re.search(r"Could not override '?([\w/]+)'?.*No match in the defaults list", text, flags=re.DOTALL):
        return f"{match[1]}: no such group; all groups are listed by --help"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    wrong = [line for line in lines if re.match(r"Value .* (could not|of type|is not)", line)]
    where = key[1] if key else "a key"
    if wrong:
        return f"{where}: {wrong[0].removeprefix('Value ')}; see --help for its type"
    if match := re.search(r"missing mandatory value: (\S+)", text, flags=re.IGNORECASE):
        name = key[1] if key else match[1]
        return f"{name}: must be given as {name}=VALUE"
    return f"{lines[0]} (key: {where}); see --help for the keys and their form"


def _check_keys(given: DictConfig, schema: type) -> None:
    """Refuses keys that `+KEY=VALUE` has added to a node with a dataclass of its own."""
    for key in _keys(given):
        path, _, name = key.rpartition(".")
        kind = OmegaConf.get_type(OmegaConf.select(given, path) if path else given)
        if is_dataclass(kind) and name not in {field.name for field in fields(kind)}:
            raise ConfigError(_unknown(key, schema))


def _unknown(key: str, schema: type) -> str:
    close = difflib.get_close_matches(key, _known(schema), n=1, cutoff=0.5)
    if key in close:
        return f"{key}: the environment chosen by env=NAME has no such key; --help lists those that it has"
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{key}: no such key; {hint}all keys are listed by --help"


def _keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """All dotted keys."""
    for key in map(str, config):
        name = f"{prefix}{key}"
        yield name
        if not OmegaConf.is_missing(config, key) and isinstance(config[key], DictConfig):
            yield from _keys(config[key], f"{name}.")


def _known(schema: type) -> list[str]:
    """All dotted keys of a schema, with those of every class that a node of it may be of."""
    config, names = OmegaConf.structured(schema), set()
    for key in _keys(config):
        names.add(key)
        kind = OmegaConf.get_type(config, key) if "." not in key else None
        for own in kind.__subclasses__() if is_dataclass(kind) else ():
            names.update(_keys(OmegaConf.structured(own), f"{key}."))
    return sorted(names)
