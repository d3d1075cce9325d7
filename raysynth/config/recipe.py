"""Reads recipes: class defaults < YAML < `--set a.b=c`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from raysynth.config.experiment import ExperimentConfig
from raysynth.errors import InputError

AnySection = TypeVar("AnySection", bound=BaseModel)


def load_recipe(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> ExperimentConfig:
    """Reads a recipe file and applies `--set` overrides.

    Args:
        path: the YAML file. Its stem is the default `name`, and `runs/<name>` the `work_dir`.
        overrides: texts such as `training.num_workers=2`; the value is read as YAML.

    Raises:
        InputError: no such file, no valid YAML, an unknown key or an impossible value.
    """
    path = Path(path)
    text = _read(path, "recipe")
    return parse_recipe(text, name=path.stem, origin=str(path), overrides=overrides)


def read_section(section: type[AnySection], path: Path, defaults: dict[str, Any]) -> AnySection:
    """Reads a YAML file that holds one section.

    Args:
        section: its class.
        path: the file.
        defaults: of keys that it may leave out.

    Raises:
        InputError: no such file, no valid YAML, an unknown key or an impossible value.
    """
    values = defaults | _mapping(_read(path, section.__name__.lower()), str(path))
    return _validated(section, values, str(path))


def _read(path: Path, noun: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{noun} {path}: {_reason(error)}; give a YAML file") from error


def parse_recipe(
    text: str, *, name: str, origin: str = "recipe", overrides: list[str] | tuple[str, ...] = ()
) -> ExperimentConfig:
    """Reads a recipe from text; see `load_recipe`."""
    values = _mapping(text, origin)
    for override in overrides:
        _apply(values, override)
    values.setdefault("name", name)
    values.setdefault("work_dir", f"runs/{values['name']}")
    return _validated(ExperimentConfig, values, origin)


def _mapping(text: str, origin: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{origin} is no valid YAML: {_reason(error)}") from error
    if not isinstance(values, dict):
        raise InputError(f"{origin}: expected `key: value` sections, found {type(values).__name__}")
    return values


def _validated(section: type[AnySection], values: dict[str, Any], origin: str) -> AnySection:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{origin}: {_first_problem(error, section)}") from error


def _apply(values: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        raise InputError(f"--set {override!r}: write it as section.key=value")
    *sections, key = dotted.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise InputError(f"--set {override!r}: {section} is a value, not a section")
    try:
        place[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {override!r}: {_reason(error)}") from error


def _first_problem(error: ValidationError, root: type[BaseModel]) -> str:
    # A key that is misspelt is missing, too: say the first.
    problem = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    # A discriminated union puts its tag into the location; what the user wrote does not have it.
    place = [str(part) for part in problem["loc"]]
    sections, place = _walk(place, root) if place else ((), place)
    dotted = ".".join(place)
    match problem["type"]:
        case "extra_forbidden":
            valid = ", ".join(field for section in sections for field in section.model_fields)
            return f"unknown key {dotted}; valid keys there: {valid}"
        case "missing":
            return f"{dotted} is missing"
        case "union_tag_not_found":
            return f"{dotted}: say which one by {problem['ctx']['discriminator']}"
        case "value_error":
            message = str(problem["ctx"]["error"])
            return f"{dotted}: {message}" if dotted else message
        case _:
            return f"{dotted} is {problem['input']!r}: {problem['msg']}"


def _walk(place: list[str], root: type[BaseModel]) -> tuple[tuple[type[BaseModel], ...], list[str]]:
    """The sections that can hold the last key of `place`, and `place` without union tags."""
    sections: tuple[type[BaseModel], ...] = (root,)
    path: list[str] = []
    for part in place[:-1]:
        tagged = [model for model in sections if _tag(model) == part]
        if tagged:
            sections = (tagged[0],)
            continue
        path.append(part)
        fields = [model.model_fields[part] for model in sections if part in model.model_fields]
        sections = _models(fields[0].annotation) if fields else ()
    if any(_tag(model) == place[-1] for model in sections):  # all of the section is to blame
        return sections, path
    return sections, [*path, place[-1]]


def _models(annotation: Any) -> tuple[type[BaseModel], ...]:
    """The sections a field may hold: one, the members of a union, or none."""
    members = getattr(annotation, "__args__", (annotation,))
    return tuple(m for m in members if isinstance(m, type) and issubclass(m, BaseModel))


def _tag(model: type[BaseModel]) -> str | None:
    """What names the section in a discriminated union."""
    for discriminator in ("kind", "family"):
        if discriminator in model.model_fields:
            return str(model.model_fields[discriminator].default)
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return " ".join(str(error).split())
