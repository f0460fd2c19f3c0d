"""Errors that a user sees as one line, with the exit code each stands for."""

from __future__ import annotations

from collections.abc import Mapping


class EsperError(Exception):
    """An error whose message is meant for the user: it names the key or path, the value, and what to do."""

    exit_code = 3


class ConfigError(EsperError):
    """Bad configuration or input."""

    exit_code = 2


class TrainingError(EsperError):
    """Training could not go on."""

    exit_code = 3


class Preempted(EsperError):
    """A signal asked for an early end; a checkpoint has been saved."""

    exit_code = 75


class Interrupted(EsperError):
    """A signal asked for an early end; there was nothing to be saved."""

    exit_code = 130


def check_positive(prefix: str, values: Mapping[str, float]) -> None:
    """Refuses values that are not above 0.

    Raises:
        ConfigError: names the first such key.
    """
    for key, value in values.items():
        if not value > 0:
            raise ConfigError(f"{prefix}.{key}={value}: must be above 0")
