"""Encoders and presets by name. Importing `hubert_eff.encoders` registers all encoders of the package."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar

from ..config import LONGEST, HubertConfig
from ..errors import UserError, short, unknown

if TYPE_CHECKING:
    from .base import Encoder

E = TypeVar("E", bound="type[Encoder]")

GROUP = "hubert_eff.encoders"  # entry points of installed packages: modules that register encoders
VARIABLE = "HUBERT_EFF_IMPORT"  # names modules that register encoders and are not installed
REMEDY = f"For an encoder of your own, name the module that registers it: {VARIABLE}=MODULE (docs/tutorials/new-encoder.md)"


@dataclass(frozen=True)
class EncoderEntry:
    """The registered parts of an encoder."""

    name: str
    module: type[Encoder]
    config: type[HubertConfig]
    presets: Mapping[str, Mapping[str, Any]]


_encoders: dict[str, EncoderEntry] = {}


def register_encoder(name: str, config: type[HubertConfig], presets: Mapping[str, Mapping[str, Any]]) -> Callable[[E], E]:
    """Register an encoder, as a class decorator.

    Args:
        name: the name of the encoder; fairseq knows its model as `hubert_NAME`.
        config: its configuration, a dataclass derived from `HubertConfig`.
        presets: the presets by name, each with the keys that differ from the defaults of `config`.

    Returns:
        A decorator for the encoder's class, which it returns unchanged.

    Raises:
        UserError: the name or one of the presets is taken (when the decorator is applied).
    """

    def register(module: E) -> E:
        if name in _encoders:
            raise UserError(f"encoder '{name}' is registered already. Known: {', '.join(sorted(_encoders))}")
        taken = set(presets) & {p for entry in _encoders.values() for p in entry.presets}
        if taken:
            raise UserError(f"preset '{taken.pop()}' of encoder '{name}' is registered already")
        _encoders[name] = EncoderEntry(name, module, config, presets)
        return module

    return register


def import_others() -> None:
    """Import the modules of others that register encoders: entry points of the group `hubert_eff.encoders`, then $HUBERT_EFF_IMPORT.

    Raises:
        UserError: one of these modules cannot be imported.
    """
    for point in entry_points(group=GROUP):
        with _importing(f"the installed encoder '{point.name}' (entry point of the group {GROUP})", "update or uninstall its package"):
            point.load()
    for name in filter(None, (part.strip() for part in os.environ.get(VARIABLE, "").split(","))):
        with _importing(f"{VARIABLE}={name}", f"put the module's folder into PYTHONPATH, or unset {VARIABLE}"):
            importlib.import_module(name)


@contextmanager
def _importing(what: str, remedy: str) -> Iterator[None]:
    """Raise `UserError` for whatever goes wrong while a module of others is imported."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what} cannot be imported ({type(error).__name__}: {short(error)}): {remedy}") from error


def unregistered(kind: str, name: object, known: Iterable[str]) -> UserError:
    """A `UserError` for an unknown encoder, preset or model, which the user may have to register first."""
    return UserError(f"{unknown(kind, name, known)}. {REMEDY}")


def list_encoders() -> list[str]:
    """List the registered encoders.

    Returns:
        Their names in alphabetical order.
    """
    return sorted(_encoders)


def list_presets() -> list[str]:
    """List the presets of all registered encoders.

    Returns:
        Their names in alphabetical order.
    """
    return sorted(p for entry in _encoders.values() for p in entry.presets)


def get_encoder(name: str) -> EncoderEntry:
    """The entry of an encoder. Raises `UserError` with the nearest name if it is unknown."""
    if name not in _encoders:
        raise unregistered("encoder", name, _encoders)
    return _encoders[name]


def encoder_of(config: HubertConfig) -> EncoderEntry:
    """The encoder of a config: the one whose dataclass the config is, or is derived from."""
    for cls in type(config).__mro__:
        for entry in _encoders.values():
            if entry.config is cls:
                return entry
    raise UserError(f"{type(config).__name__} is not the config of a registered encoder. Known: {', '.join(_encoders)}")


def preset_config(preset: str, **overrides: Any) -> HubertConfig:
    """The config of a preset with some keys replaced; `PRESET+w1a1`, `+w1a2`, `+w1a4` or `+w1a8` is its binarized form."""
    name, plus, spec = preset.partition("+")
    for entry in _encoders.values():
        if name in entry.presets:
            quant = {"quant": spec} if plus else {}
            return entry.config.from_dict({**entry.presets[name], **quant, **overrides})
    raise unregistered("preset", preset, list_presets())


def stored_config(encoder: str, written: str | Mapping[str, Any]) -> HubertConfig:
    """Read the configuration that comes with weights in a file, as JSON or as values. Raises `UserError` for an invalid one.

    The file is not trusted: a policy cannot name another file, and texts cannot be long.
    """
    if isinstance(written, str):
        if len(written) > LONGEST:
            raise UserError(f"its configuration has {len(written)} characters: more than {LONGEST} is not a configuration")
        try:
            written = json.loads(written)
        except (ValueError, RecursionError) as error:
            raise UserError(f"its configuration is not valid JSON ({short(error)})") from error
        if not isinstance(written, dict):
            raise UserError("its configuration is not a JSON object")
    for key, value in written.items():
        if not isinstance(key, str) or not _is_plain(value):
            raise UserError(
                f"its configuration has {short(repr(key))} as a {type(value).__name__}, which is not a value of a configuration"
            )
    policy = written.get("quant_policy", "default")
    if isinstance(policy, str) and policy.lstrip().startswith("{"):  # files hold JSON: no YAML with aliases, no path
        try:
            json.loads(policy)
        except (ValueError, RecursionError) as error:
            raise UserError(f"its quant_policy is not valid JSON ({short(error)})") from error
    elif policy not in ("default", "paper"):
        raise UserError(f"its quant_policy {short(repr(policy))} is neither default nor paper, nor a policy's text")
    try:
        return get_encoder(encoder).config.from_dict(written)
    except UserError as error:
        raise UserError(short(error, 600)) from error


def _is_plain(value: object) -> bool:
    """Whether a value is a scalar or a list of scalars."""
    scalars = (str, int, float, NoneType)
    return isinstance(value, scalars) or (isinstance(value, (list, tuple)) and all(isinstance(part, scalars) for part in value))


def written_config(written: Mapping[str, Any]) -> HubertConfig:
    """The model's config from a fairseq configuration (YAML) of configs/, including what its sections `task` and `common` decide."""
    task = written["task"]
    values = {**written["model"], "label_rate": task["label_rate"], "normalize": task["normalize"], "seed": written["common"]["seed"]}
    return get_encoder(str(values.pop("_name")).removeprefix("hubert_")).config.from_dict(values)
