"""The training configurations of configs/, composed from groups by hydra as `fairseq-hydra-train` composes them."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, require, unknown
from .files import config_dir

KINDS = ("pretrain", "quantize", "finetune")
SHOW = "hubert-eff config"  # the command that shows all names; with the name of a configuration, all keys
HYDRA_KEYS = {"job": ("chdir",), "run": ("dir",), "sweep": ("dir", "subdir")}  # hydra's own keys that the configurations set


def plugin_dir() -> Path:
    """The folder for fairseq's `common.user_dir`."""
    spec = importlib.util.find_spec("fairseq_plugins")
    if spec is None or spec.origin is None:
        raise UserError("the package fairseq_plugins is not installed: pip install 'hubert-eff[all]'")
    return Path(spec.origin).parent


def groups_dir() -> Path:
    """The folder of the groups (encoder, data, optim ...); their files are the members."""
    return config_dir() / "groups"


def list_groups() -> dict[str, list[str]]:
    """Members by group. Members with a leading underscore are parts of others and cannot be chosen."""
    groups = sorted(path for path in groups_dir().iterdir() if path.is_dir())
    return {group.name: sorted(p.stem for p in group.glob("*.yaml") if not p.stem.startswith("_")) for group in groups}


def list_configurations(kind: str | None = None) -> list[str]:
    """Names of the configurations of a kind (pretrain, quantize or finetune), or of all as KIND/NAME."""
    if kind is not None:
        return sorted(path.stem for path in (config_dir() / kind).glob("*.yaml"))
    return [f"{kind}/{name}" for kind in KINDS for name in list_configurations(kind)]


def find_configuration(name: str) -> Path:
    """Find the primary file of NAME or KIND/NAME; if several kinds have the name, the first of `KINDS` counts. Dashes may replace
    underscores, as in names of presets; presets with a configuration of another name, such as conformer-debug, lead to that one.

    Raises `UserError` with the nearest name if there is none.
    """
    kind, slash, stem = name.replace("-", "_").rpartition("/")
    for candidate in (kind,) if slash else KINDS:
        path = config_dir() / candidate / f"{stem}.yaml"
        if candidate in KINDS and path.is_file():
            return path
        if candidate in KINDS and stem in list_groups()["encoder"]:
            trained = [entry for entry in list_configurations(candidate) if encoder_of(candidate, entry) == stem]
            if len(trained) == 1:
                return config_dir() / candidate / f"{trained[0]}.yaml"
    if kind in KINDS:
        raise unknown("configuration", stem, list_configurations(kind), SHOW)
    known = list_configurations()
    raise unknown("configuration", name, known if slash else {entry.partition("/")[2] for entry in known}, SHOW)


def encoder_of(kind: str, name: str) -> str | None:
    """The member of the group encoder that the configuration KIND/NAME chooses, such as conformer_s."""
    text = (config_dir() / kind / f"{name}.yaml").read_text(encoding="utf-8")
    found = re.search(r"^  - encoder: (\w+)$", text, re.MULTILINE)
    return found[1] if found else None


def choices(words: Iterable[str]) -> list[str]:
    """The overrides that choose a member of a group, GROUP=MEMBER; keys have a dot, and whole sections are {...}."""
    return [word for word in words if re.match(r"\+{0,2}[A-Za-z_]\w*=(?!\{)", word)]


def check_choices(overrides: Sequence[str]) -> None:
    """Raise `UserError`, with the nearest name, for an override GROUP=MEMBER (or GROUP=A,B in a sweep) of no known group or member.

    It also refuses to delete a group or a whole section (~GROUP), since every run needs one member of each.
    """
    groups = list_groups()
    for override in overrides:
        deleted = re.fullmatch(r"~([A-Za-z_]\w*)(=.*)?", override)
        if deleted and deleted[1] in groups:
            raise UserError(f"{override}: a group cannot be left out: choose a member, {deleted[1]}={' | '.join(groups[deleted[1]])}")
        if deleted:
            raise UserError(f"{override}: a whole section cannot be left out: choose another member of a group ({', '.join(groups)})")
    for override in choices(overrides):
        group, _, value = override.lstrip("+").partition("=")
        if group not in groups:
            raise unknown(f"group in '{override}'", group, groups)
        for member in value.split(","):
            if member.strip() not in groups[group]:
                raise unknown(f"{group} in '{override}'", member.strip(), groups[group], SHOW)


def check_overrides(words: Iterable[object]) -> None:
    """Raise `UserError` for a KEY=VALUE that hydra cannot read."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for word in words:
        try:
            parser.parse_override(str(word))
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"hydra does not read {word} ({reason}): quote what is not plain, as in \"KEY='VALUE'\"") from error


def check_half_precision(*, fp16: bool, amp: bool, cpu: bool) -> None:
    """Raise `UserError` for a training run in half precision without a GPU, from the keys of the section `common`."""
    if not fp16 and not amp:
        return
    import torch

    if cpu or not torch.cuda.is_available():
        key = "fp16" if fp16 else "amp"
        raise UserError(f"common.{key}=true needs a GPU and none is in use: add common.{key}=false (CPUs train in float32 or bf16)")


def load_config(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Compose the configuration NAME or KIND/NAME as fairseq does, with hydra's overrides; references such as ${task.data} are kept.

    Raises `UserError` for an unknown name, group, member or key, a malformed override, and where hydra is not installed.
    """
    path = find_configuration(name)
    require("hydra", "fairseq", "composing a training configuration")
    check_overrides(overrides)
    check_choices(overrides)
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    logging.getLogger("hydra.core.utils").setLevel(logging.INFO)  # it needlessly prints the name of the job
    schemas = ConfigStore.instance().repo
    schema = schemas.pop(path.name, None)  # fairseq stores its schema, with all defaults, under the name of the configuration that it runs
    try:
        with initialize_config_dir(str(path.parent.resolve()), version_base="1.1"):
            composed = compose(path.stem, list(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        missing = re.search(r"Could not find '([\w/]+)'", str(error))
        if missing and missing[1].startswith("schedule/"):
            raise UserError(
                f"{name}: no schedule for {missing[1].removeprefix('schedule/')} (RECIPE_DATA_OPTIM): choose another data= or optim="
            ) from error
        key = re.match(r"Could not override '([^']+)'", lines[0])
        if key and _is_fairseqs(key[1]):  # a key that the configuration leaves at fairseq's default
            return load_config(name, [f"+{word}" if word.partition("=")[0] == key[1] else word for word in overrides])
        if key:
            raise unknown(f"key in the overrides of {name}", key[1], _keys(load_config(name)), f"{SHOW} {name}") from error
        raise UserError(f"{' '.join([name, *overrides])}: {' '.join(lines[0].split())}") from error
    finally:
        if schema is not None:
            schemas[path.name] = schema
    own: Any = OmegaConf.to_container(composed.hydra, resolve=False)
    whole: Any = OmegaConf.to_container(composed, resolve=False)
    whole.pop("hydra")
    return {**whole, "hydra": {section: {key: own[section][key] for key in keys} for section, keys in HYDRA_KEYS.items()}}


def _is_fairseqs(key: str) -> bool:
    """Whether fairseq, if installed, has a key of this name, such as common.bf16."""
    if importlib.util.find_spec("fairseq") is None:
        return False
    from fairseq.dataclass.configs import FairseqConfig

    section, _, own = key.partition(".")
    group = getattr(FairseqConfig(), section, None)  # a class, or one of its instances
    return own in getattr(group, "__dataclass_fields__", {})


def _keys(values: dict[str, Any], above: str = "") -> list[str]:
    found: list[str] = []
    for key, value in values.items():
        found += _keys(value, f"{above}{key}.") if isinstance(value, dict) else [f"{above}{key}"]
    return found
