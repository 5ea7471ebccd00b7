"""Policies: which kinds of layers are binarized, which stay float, and why. Encoders declare kinds, and a policy names no encoder.

A policy is YAML, or the mapping that YAML gives:

    base: default                  # the policy for everything else: default | paper
    depthwise_conv: binary         # binary | float, for any of `BINARY_KINDS`
    weight_scale: channel          # channel: one weight scale per output channel; tensor: one per layer
    moves: all                     # learnable biases before quantizers: all | attention (queries, keys and values of blocks without
                                   # convolution) | none
    attention_dropout: codes       # what dropout of attention zeroes: codes | probabilities (before the threshold, as BiT: what is left
                                   # of them is larger, and in training more of them become bits than in evaluation)
    modules:                       # single modules, or patterns of them; the last match decides
      encoder.layers.0.*: float
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config import LONGEST
from ..errors import UserError, short, unknown
from ..layers.kinds import BINARY_KINDS, DEPTHWISE, FEED_FORWARD, FLOAT_KINDS, POINTWISE, PRODUCT, PROJECTION

BINARY, FLOAT = "binary", "float"
SPECS = {"w1a1": 1, "w1a2": 2, "w1a4": 4, "w1a8": 8}  # name -> bits of activations
CHOICES = {"weight_scale": ("channel", "tensor"), "moves": ("all", "attention", "none"), "attention_dropout": ("codes", "probabilities")}
MOST_MODULES = 500
MOST = "holds most of the weights and products"


@dataclass(frozen=True)
class Policy:
    """The (action, reason) for each kind, and its details; `modules`: (pattern of paths, action)."""

    base: str
    rules: Mapping[str, tuple[str, str]]
    weight_scale: str
    moves: str
    attention_dropout: str = "codes"
    modules: Sequence[tuple[str, str]] = ()
    source: Mapping[str, Any] = field(default_factory=dict)

    def decide(self, path: str, kind: str) -> tuple[str, str]:
        """(action, reason) for the module at `path`. Raises `UserError` if the policy binarizes something that must stay float."""
        action, reason = (FLOAT, FLOAT_KINDS[kind]) if kind in FLOAT_KINDS else self.rules[kind]
        for pattern, wanted in self.modules:
            if _fits(path, pattern):
                if kind in FLOAT_KINDS and wanted == BINARY:
                    raise UserError(f"the policy binarizes '{path}', which has to stay float: {reason}")
                action, reason = wanted, f"the policy says so of {pattern}"
        return action, reason

    def check(self, paths: Sequence[str]) -> None:
        """Raise `UserError` if `modules` names a path that the model does not have."""
        for pattern, _ in self.modules:
            if not any(_fits(path, pattern) for path in paths):
                raise unknown("module in the policy", pattern, paths)

    @property
    def text(self) -> str:
        """The name of the policy, or its whole content on one line, which `read_policy` reads."""
        return json.dumps(self.source, sort_keys=False) if self.source else self.base


def _fits(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or path.startswith(pattern + ".")


POLICIES = {
    "default": Policy(
        "default",
        {
            PROJECTION: (BINARY, MOST),
            PRODUCT: (BINARY, "its share grows with the length of the audio"),
            FEED_FORWARD: (BINARY, MOST),
            POINTWISE: (BINARY, MOST),
            DEPTHWISE: (FLOAT, "about 1 % of the weights; one bit would gain little and costs the filters their shape"),
        },
        weight_scale="channel",
        moves="all",
    ),
    "paper": Policy(
        "paper",
        {kind: (BINARY, "the paper's storage counts one bit per weight of every layer in the blocks") for kind in BINARY_KINDS},
        weight_scale="tensor",
        moves="attention",
    ),
}


def _read_yaml(text: str) -> Any:
    """Read mappings, lists and text, without aliases, by which a few lines can stand for gigabytes. Raises `ValueError` for other YAML."""
    import yaml  # imported here, because few models have their own policy and loading a file does not need it

    class Loader(yaml.BaseLoader):
        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("an alias (*), which a policy does not need")
            return super().compose_node(parent, index)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def is_policy(value: object) -> bool:
    """Whether a value is a policy: a mapping, its text on one line, the name of a policy, or a YAML file."""
    text = str(value)
    return isinstance(value, Mapping) or text in POLICIES or text.lstrip().startswith("{") or Path(text).suffix in (".yaml", ".yml")


def read_policy(policy: str | Path | Mapping[str, Any]) -> Policy:
    """Read a policy by name, from a mapping, from its text on one line ({...}), or from a YAML file.

    Raises `UserError` for an unknown name, key or value.
    """
    if isinstance(policy, Mapping):
        return _parse(policy, "the policy")
    text = str(policy)
    if text in POLICIES:
        return POLICIES[text]
    inline = text.lstrip().startswith("{")
    if not inline and not Path(text).is_file():
        hint = " (or the path of a YAML file, which is not there)" if Path(text).suffix in (".yaml", ".yml") else ""
        raise unknown(f"policy{hint}", text, POLICIES)
    where = "the policy" if inline else text
    try:
        if not inline:
            with Path(text).open(encoding="utf-8") as stream:
                text = stream.read(LONGEST + 1)
        if len(text) > LONGEST:
            raise UserError(f"{where} has more than {LONGEST} characters")
        content = _read_yaml(text)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid YAML: {short(error)}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{where} must map kinds of layers to {BINARY} or {FLOAT}")
    return _parse(content, where)


def _parse(content: Mapping[str, Any], where: str) -> Policy:
    base = str(content.get("base", "default"))
    if base not in POLICIES:
        raise unknown("policy", base, POLICIES)
    policy = POLICIES[base]
    rules = dict(policy.rules)
    for key, value in content.items():
        if key in FLOAT_KINDS:
            raise UserError(f"{where}: {key} always stays float: {FLOAT_KINDS[key]}")
        if key in BINARY_KINDS:
            rules[key] = (_action(key, value, where), "the policy says so")
        elif key in CHOICES:
            if value not in CHOICES[key]:
                raise unknown(f"value of {key} in {where}", value, CHOICES[key])
        elif key not in ("base", "modules"):
            raise unknown(f"key of {where}", key, ["base", "modules", *CHOICES, *BINARY_KINDS])
    modules = content.get("modules") or {}
    if not isinstance(modules, Mapping):
        raise UserError(f"{where}: modules must map paths of modules to {BINARY} or {FLOAT}")
    if len(modules) > MOST_MODULES:
        raise UserError(f"{where}: modules has {len(modules)} entries, at most {MOST_MODULES}: patterns such as encoder.layers.* name many")
    return replace(
        policy,
        rules=rules,
        modules=tuple((str(path), _action(path, action, where)) for path, action in modules.items()),
        source=dict(content),
        **{key: content[key] for key in CHOICES if key in content},
    )


def _action(key: object, value: object, where: str) -> str:
    if value not in (BINARY, FLOAT):
        raise unknown(f"action for '{key}' in {where}", value, (BINARY, FLOAT))
    return str(value)
