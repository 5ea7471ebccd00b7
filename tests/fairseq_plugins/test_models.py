"""Registered models and their configurations."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import hubert_eff
from hubert_eff.encoders.registry import get_encoder, preset_config
from hubert_eff.errors import UserError
from hubert_eff.models.hubert import HubertModel
from hubert_eff.quant import BinaryLinear
from hubert_eff.utils.configurations import load_config

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")
from fairseq.dataclass.configs import FairseqConfig  # noqa: E402
from fairseq.models import MODEL_DATACLASS_REGISTRY, MODEL_REGISTRY  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

import fairseq_plugins  # noqa: E402, F401

from ..helpers.pretraining import CLASSES, CONFIGS, composed, make_task  # noqa: E402

# a configuration is named after the preset it trains; `debug`, the one to start with, is a Conformer
PRESET_OF = {
    path.stem: "conformer-debug" if path.stem == "debug" else path.stem.replace("_", "-") for path in sorted(CONFIGS.glob("*.yaml"))
}


DECIDED_ELSEWHERE = {"label_rate", "normalize", "seed"}  # by the task and by common.seed


# -- models --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", hubert_eff.list_encoders())
def test_every_encoder_is_a_fairseq_model_with_its_own_keys(encoder: str) -> None:
    config = get_encoder(encoder).config
    derived = {f.name: f.default for f in dataclasses.fields(MODEL_DATACLASS_REGISTRY[f"hubert_{encoder}"])}
    assert derived.pop("_name") is None
    assert {k: v for k, v in derived.items() if k not in DECIDED_ELSEWHERE} == {
        f.name: f.default for f in dataclasses.fields(config) if f.name not in DECIDED_ELSEWHERE
    }
    assert derived["label_rate"] == "${task.label_rate}" and derived["seed"] == "${common.seed}"


@pytest.mark.parametrize("encoder", hubert_eff.list_encoders())
def test_state_names_are_the_core_models(encoder: str, data: Path) -> None:
    task, cfg = make_task(data)
    preset = f"{encoder}-debug"
    keys = {k: v for k, v in preset_config(preset).to_dict().items() if k not in DECIDED_ELSEWHERE}
    section = OmegaConf.create({"_name": f"hubert_{encoder}", **keys, "label_rate": 100.0, "normalize": True, "seed": 7})
    model = task.build_model(section)
    assert isinstance(model, HubertModel) and isinstance(model, MODEL_REGISTRY[f"hubert_{encoder}"])
    assert (model.config.label_rate, model.config.normalize, model.config.seed) == (100.0, True, 7)
    plain = hubert_eff.build(preset, num_classes=[CLASSES + 4])  # fairseq's dictionaries begin with four special symbols
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    model.set_num_updates(12)
    assert model.num_updates == 12


def test_binarized_model_and_its_policy_are_in_the_configuration(data: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("feed_forward: float")
    task, cfg = make_task(data, "model.quant=w1a1", f"model.quant_policy={policy}")
    model = task.build_model(cfg.model)
    assert isinstance(model.encoder.layers[0].self_attn.q_proj, BinaryLinear)
    assert not isinstance(model.encoder.layers[0].ffn1.w_1, BinaryLinear)
    assert json.loads(cfg.model.quant_policy) == {"feed_forward": "float"}
    with pytest.raises(UserError, match="weights of a float model"):
        model.load_state_dict(hubert_eff.build("conformer-debug").state_dict(), strict=True, model_cfg=cfg.model)


def test_unknown_model_name_offers_the_nearest(data: Path) -> None:
    task, cfg = make_task(data)
    cfg.model._name = "hubert_conformr"
    with pytest.raises(UserError, match="did you mean 'hubert_conformer'"):
        task.build_model(cfg.model)


def test_bad_mask_setting_is_refused_before_training(data: Path) -> None:
    task, cfg = make_task(data, "model.mask_channel_prob=0.1", "model.mask_channel_length=10")
    with pytest.raises(UserError, match="mask_channel_prob=0.1"):
        task.build_model(cfg.model)


# -- configurations ------------------------------------------------------------------------------------------------------


def test_every_preset_has_its_configuration() -> None:
    assert set(PRESET_OF.values()) == set(hubert_eff.list_presets())


@pytest.mark.parametrize("name", [p.stem for p in sorted(CONFIGS.glob("*.yaml"))])
def test_config_composes_and_says_the_same_as_its_preset(name: str) -> None:
    cfg = composed(name)
    preset = preset_config(PRESET_OF[name]).to_dict()
    model = OmegaConf.to_container(cfg.model)
    assert model.pop("_name") == f"hubert_{PRESET_OF[name].split('-')[0]}"
    assert model.pop("seed") == cfg.common.seed
    assert model.pop("label_rate") == cfg.task.label_rate
    assert model.pop("normalize") == cfg.task.normalize
    assert model == {k: v for k, v in preset.items() if k not in DECIDED_ELSEWHERE}
    OmegaConf.merge(OmegaConf.structured(FairseqConfig), {k: cfg[k] for k in ("common", "dataset", "optimization", "checkpoint")})


@pytest.mark.parametrize("name", sorted(PRESET_OF))
def test_config_lists_every_key_so_that_all_can_be_overridden(name: str) -> None:
    written = OmegaConf.create(load_config(f"pretrain/{name}"))
    encoder = get_encoder(written.model._name.removeprefix("hubert_"))
    assert set(written.model) == {f.name for f in dataclasses.fields(encoder.config)} | {"_name"}
    cfg = composed(name, *(f"model.{key}={json.dumps(value)}" for key, value in written.model.items()
                           if key not in DECIDED_ELSEWHERE and isinstance(value, (int, float, bool))),
                   "task.label_rate=50", "common.all_gather_list_size=32768", "dataset.curriculum=1")  # fmt: skip
    assert cfg.model.label_rate == 50 and cfg.common.all_gather_list_size == 32768


def test_recipe_is_the_papers() -> None:
    for name in ("transformer_base", "conformer_s"):
        cfg = composed(name)
        assert cfg.dataset.max_tokens == 36.5 * 16_000
        assert cfg.optimization.max_update == cfg.lr_scheduler.total_num_update == 250_000
        assert cfg.task.label_rate == 100
        assert cfg.lr_scheduler.warmup_updates == 0.08 * cfg.optimization.max_update
