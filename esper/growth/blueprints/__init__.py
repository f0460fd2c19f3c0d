"""The catalogue of blueprints. Each lives in a module of its own and registers itself by one decorated class."""

from esper.growth.blueprints.registry import Blueprint, ParameterSpec, available, get, register

__all__ = ["Blueprint", "ParameterSpec", "available", "get", "register"]
