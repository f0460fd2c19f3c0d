"""The catalogue of blueprints. Each lives in a module of its own and registers itself by one decorated class."""

from esper.growth.blueprints.registry import Blueprint, Site, available, get, register
from esper.growth.parameters import ParameterSpec

__all__ = ["Blueprint", "ParameterSpec", "Site", "available", "get", "register"]
