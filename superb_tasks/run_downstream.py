"""`python -m superb_tasks.run_downstream ...`: S3PRL's run_downstream with the upstream `hubert_eff`.

    python -m superb_tasks.run_downstream -m train -u hubert_eff -k CKPT -d speech_commands -p EXPDIR
        -o config.downstream_expert.datarc.speech_commands_root=DIR,,config.downstream_expert.datarc.speech_commands_test_root=DIR
    python -m superb_tasks.run_downstream -m evaluate -e EXPDIR/dev-best.ckpt

All arguments are S3PRL's. Its wheel ships no configs: those in superb_tasks/configs are the default of `-c`. Without a GPU,
`--device cpu` is the default.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hubert_eff.errors import UserError, short, unknown

from . import register, require_s3prl
from .data import layouts
from .running.launch import check_keywords, check_upstream, command_line, device_arguments, exit_code, folder, lookup, read_config

CONFIGS = Path(__file__).parent / "configs"  # <downstream>.yaml


def run(argv: Sequence[str]) -> None:
    """Check, register the upstream, and start S3PRL. Raises `UserError` for bad input."""
    require_s3prl()
    arguments = list(argv)
    downstream, cache = None, Path()
    if not {"-h", "--help"} & set(arguments):
        added, downstream, cache = _check(arguments)
        arguments += added
    register()
    if downstream:
        from . import patches

        patches.prepare(downstream, cache)
    import s3prl.run_downstream
    from s3prl.downstream import runner

    from .running.progress import lines_for_bars

    with command_line(*arguments), lines_for_bars(runner):  # its main() takes no arguments
        s3prl.run_downstream.main()


def _check(arguments: Sequence[str]) -> tuple[list[str], str, Path]:
    """Check config, data and upstream before the work starts; returns arguments to add, the downstream and a folder for its cache."""
    # only arguments that matter here; S3PRL's parser handles all others, and mistakes
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for letter, long in (("-c", "--config"), ("-d", "--downstream"), ("-u", "--upstream"), ("-k", "--upstream_ckpt"),
                        ("-e", "--past_exp"), ("-o", "--override"), ("-p", "--expdir"), ("-n", "--expname")):  # fmt: skip
        parser.add_argument(letter, long)
    parser.add_argument("--device")
    given, _ = parser.parse_known_args(list(arguments))

    added: list[str] = []
    if given.past_exp:
        downstream, upstream, source, folder_name, config = _experiment(Path(given.past_exp))
    else:
        folder_name = given.expdir or f"result/downstream/{given.expname}"  # S3PRL's default
        downstream, upstream, source = given.downstream, given.upstream, given.upstream_ckpt
        if not given.config:
            given.config = str(CONFIGS / f"{downstream}.yaml")
            added = ["-c", given.config]
            if not Path(given.config).is_file():
                raise unknown("downstream task without a config (-c FILE)", downstream, (f.stem for f in CONFIGS.glob("*.yaml")))
        config = read_config(given.config)
    overrides = dict(part.strip().split("=", 1) for part in (given.override or "").split(",,") if "=" in part)

    def setting(key: str) -> str | None:
        value = overrides.get(key, lookup({"config": config}, key))
        return None if value is None else str(value).strip().strip("'\"")

    if downstream == "speech_commands":
        keys = [f"config.downstream_expert.datarc.{name}" for name in ("speech_commands_root", "speech_commands_test_root")]
        check_keywords(*(folder(setting(key), f"-o {key}=") for key in keys))
    check_upstream(upstream, source)
    data = Path(setting("config.downstream_expert.datarc.file_path") or "")
    cache = Path(folder_name).resolve() / "cache" / (layouts.digest([data])[:16] if "voxceleb1" in downstream and data.name else "")
    return added + device_arguments(given=given.device is not None), downstream, cache


def _experiment(path: Path) -> tuple[str, str, str, str, Mapping[str, Any]]:
    """Downstream task, upstream, its source, the folder and the config of an earlier experiment: `states-*.ckpt` of a folder, or a file."""
    files = sorted(path.glob("states-*.ckpt"), key=lambda f: int(f.stem.split("-")[-1])) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no states-*.ckpt: name the folder of an experiment, or one of its checkpoints, with -e")
    if not files[-1].is_file():
        raise UserError(f"-e {path}: no such experiment")
    from hubert_eff.checkpoints.torchfile import TorchFile, Unreadable  # and with it torch

    try:
        with TorchFile(files[-1]) as opened:
            args, config = opened.content["Args"], opened.content["Config"]
        return args.downstream, args.upstream, args.upstream_ckpt, args.expdir, config
    except Unreadable as error:
        raise UserError(f"{files[-1]} is not a checkpoint of run_downstream: it {error.reason}") from error
    except (AttributeError, LookupError, TypeError) as error:
        raise UserError(f"{files[-1]} is not a checkpoint of run_downstream: {short(error)}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    return exit_code("superb_tasks.run_downstream", run, argv)


if __name__ == "__main__":
    sys.exit(main())
