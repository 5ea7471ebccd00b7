"""Configurations composed from groups: from code, on the command line, with overrides."""

from __future__ import annotations

import logging
import re

import pytest
import yaml

from hubert_eff.cli import main
from hubert_eff.errors import UserError
from hubert_eff.reports.table1 import PAPER_TABLE
from hubert_eff.utils.configurations import choices, find_configuration, list_configurations, list_groups, load_config
from hubert_eff.utils.files import config_dir


def differences(a, b, above=""):
    """Keys whose values differ."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return [] if a == b else [above]
    return [key for k in {**a, **b} for key in differences(a.get(k), b.get(k), f"{above}.{k}".lstrip("."))]


def test_every_configuration_composes():
    names = list_configurations()
    assert len(names) >= 44
    for name in names:
        config = load_config(name)
        assert config["model"]["_name"].startswith("hubert_") and config["checkpoint"]["save_dir"].startswith("checkpoints/")
        assert config["hydra"]["job"] == {"chdir": False} and config["hydra"]["run"] == {"dir": "${checkpoint.save_dir}"}


def test_choosing_members_equals_the_configurations_that_have_them():
    chosen = load_config("debug", ["encoder=zipformer_debug", "optim=scaled_adam"])
    assert differences(chosen, load_config("zipformer_debug")) == ["checkpoint.save_dir"]
    assert differences(load_config("conformer_s", ["quant=w1a1"]), load_config("conformer_s_w1a1")) == ["checkpoint.save_dir"]
    distilled = load_config("conformer_s", ["quant=w1a1", "objective=distill"])
    changed = differences(distilled, load_config("conformer_s_distill"))
    assert not set(changed) - {"checkpoint.save_dir"}


def test_the_second_iteration_changes_rate_and_length():
    second = load_config("conformer_s", ["data=iter2"])
    assert second["task"]["label_rate"] == 50 and second["optimization"]["max_update"] == 600_000
    assert sorted(differences(second, load_config("conformer_s"))) == [
        "lr_scheduler.warmup_updates", "optimization.max_update", "task.label_rate",
    ]  # fmt: skip
    assert differences(load_config("debug", ["data=iter2"]), load_config("debug")) == ["task.label_rate"]


@pytest.mark.parametrize("kind", ["w1a1", "distill"])
def test_one_bit_rows_of_the_paper_have_both_phases(kind):
    presets = [row.preset.partition("+")[0] for row in PAPER_TABLE if "+" in row.preset]
    assert len(presets) == 5
    for name in [preset.replace("-", "_") for preset in presets]:
        first, second = (load_config(f"quantize/{name}_{kind}", overrides) for overrides in ([], ["data=iter2"]))
        for config, rate, updates in ((first, 100, 250_000), (second, 50, 600_000)):
            assert (config["task"]["label_rate"], config["optimization"]["max_update"]) == (rate, updates)
            assert (config["model"]["quant"], config["model"]["quant_policy"]) == ("w1a1", "paper")
            assert {g["lr_scheduler"]["warmup_updates"] for g in config["optimizer"]["groups"].values()} == {0.08 * updates}
        changed = {key.rpartition(".")[2] for key in differences(first, second)}
        assert changed == {"label_rate", "max_update", "warmup_updates"}


def test_the_papers_policy_can_be_chosen():
    chosen = load_config("squeezeformer_xs", ["quant=w1a1_paper"])
    assert sorted(differences(chosen, load_config("squeezeformer_xs_w1a1"))) == ["checkpoint.save_dir", "model.quant_policy"]


def test_every_encoder_of_a_group_fits_every_recipe():
    for encoder in list_groups()["encoder"]:
        debug, full = (load_config("debug", [f"encoder={encoder}", f"recipe={recipe}"]) for recipe in ("debug", "hubert_base"))
        assert debug["model"] == full["model"], "an encoder is its preset, whatever the recipe"


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("conformer_x", [], "conformer_s"),
        ("pretrain/conformer_s_w1a1", [], "conformer_s"),
        ("conformer_s", ["encoder=zipfomer_s"], "zipformer_s"),
        ("conformer_s", ["encodr=zipformer_s"], "encoder"),
        ("conformer_s", ["encoder=_debug"], "encoder"),
        ("conformer_s", ["optimization.max_updat=3"], "optimization.max_update"),
        ("fusionformer_debug", ["optim=noam"], "schedule"),
        ("conformer_s", ["task.data="], None),
        ("conformer_s", ["task.data=a=b"], "a=b"),
        ("conformer_s", ["=3"], "=3"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(name, overrides, words):
    if words is None:
        assert load_config(name, overrides)["task"]["data"] == ""
        return
    with pytest.raises(UserError) as error:
        load_config(name, overrides)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_section_can_be_set_as_a_whole():
    changed = load_config("debug", ["optimizer={weight_decay:0.5}", "criterion={log_keys:[a]}"])
    assert changed["optimizer"]["weight_decay"] == 0.5 and changed["optimizer"]["_name"] == "adam"
    assert changed["criterion"]["log_keys"] == ["a"] and changed["criterion"]["_name"] == "hubert_eff"
    assert choices(["optimizer={_name:scaled_adam}", "optim=adam", "optimization.lr=[1]"]) == ["optim=adam"]


def test_the_command_prints_what_fairseq_reads(capsys):
    assert main(["config", "conformer_s", "encoder=zipformer_s", "optimization.lr=[0.1]"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == load_config("conformer_s", ["encoder=zipformer_s", "optimization.lr=[0.1]"])
    assert printed["optimization"]["lr"] == [0.1] and printed["model"]["_name"] == "hubert_zipformer"
    assert main(["config"]) == 0
    assert {"pretrain/conformer_s", "finetune/debug"} <= set(capsys.readouterr().out.splitlines())
    assert main(["config", "conformer_s", "encoder=zipfomer_s"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_head_of_a_configuration_names_the_command_that_trains_it():
    for entry in list_configurations():
        path = config_dir() / f"{entry}.yaml"
        (name,) = re.findall(r"^#   hubert-eff train (\S+) ", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert find_configuration(name) == path


def test_composing_logs_nothing_even_where_everything_is_logged(caplog):
    """fairseq, once imported, logs all that hydra says."""
    logging.getLogger("hydra.core.utils").setLevel(logging.NOTSET)
    with caplog.at_level(logging.DEBUG):
        load_config("debug")
    assert not [record for record in caplog.records if record.name.startswith("hydra")]


def test_a_schema_that_fairseq_keeps_does_not_show():
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store("conformer_s", {"common": {"profile": False}})
    assert "profile" not in load_config("conformer_s")["common"]
    assert ConfigStore.instance().repo.pop("conformer_s.yaml").node == {"common": {"profile": False}}


def test_fairseqs_command_line_is_refused_in_one_line_with_the_code_of_bad_input(monkeypatch, capsys):
    plugin = pytest.importorskip("hydra_plugins.hubert_eff_configs")
    from hydra._internal.config_search_path_impl import ConfigSearchPathImpl

    def started_with(*words, plug_in=("common.user_dir=plug-in",), name="debug"):
        words = (*plug_in, *words)
        monkeypatch.setattr(plugin, "_checked", False)
        folder = str(config_dir() / "pretrain")
        monkeypatch.setattr("sys.argv", ["fairseq-hydra-train", "--config-dir", folder, "--config-name", name, *words])
        plugin.HubertEffConfigs().manipulate_search_path(ConfigSearchPathImpl())

    started_with("encoder=zipformer_debug", "optimization.lr=[0.1]")
    with pytest.raises(SystemExit) as stopped:
        started_with("encoder=zipfomer_debug")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "did you mean 'zipformer_debug'" in error
    for word, message in (
        ("~optim", "~optim: a group cannot be left out: choose a member, optim=adam | "), ("~encoder=conformer_s", "a group cannot"),
        ("~optimizer", "~optimizer: a whole section cannot be left out"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            started_with(word)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1 and message in error
    started_with("~common.seed")
    for arguments, message in (({"plug_in": ()}, "or run hubert-eff train instead"), ({"name": "debgu"}, "did you mean 'debug'")):
        with pytest.raises(SystemExit) as stopped:
            started_with(**arguments)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1 and message in error
