"""`python -m superb_tasks.main PROBLEM ...`: S3PRL's s3prl-main with the upstream `hubert_eff`.

    python -m superb_tasks.main SuperbKS --target_dir OUT --build_upstream.name hubert_eff
        --build_upstream.path_or_url CKPT --prepare_data.gsc1 DIR --prepare_data.gsc1_test DIR

All arguments are S3PRL's. Without a GPU, `--device cpu` is the default.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hubert_eff.errors import UserError, unknown

from . import register, require_s3prl
from .running.launch import check_keywords, check_upstream, device_arguments, exit_code, folder, lookup, read_config

# arguments with which S3PRL prints or writes something and stops
INFORMATION = {"-h", "--help", "-p", "--print_config", "-d", "--dump_config"}


def run(argv: Sequence[str]) -> None:
    """Check, register the upstream, and start S3PRL. Raises `UserError` for bad input."""
    require_s3prl()
    if not argv or argv[0].startswith("-"):
        raise UserError("name the problem first: python -m superb_tasks.main SuperbKS --help")
    problem_name, arguments = argv[0], list(argv[1:])
    if not INFORMATION & set(arguments):
        arguments += _check(problem_name, arguments)
    register()
    from s3prl import problem
    from s3prl.problem import base

    from .running.progress import lines_for_bars

    if problem_name not in problem.__all__:
        raise unknown("problem", problem_name, [name for name in problem.__all__ if name.startswith("Superb")])
    with lines_for_bars(base):
        getattr(problem, problem_name)().main(arguments)


def _check(problem_name: str, arguments: Sequence[str]) -> list[str]:
    """Check data and upstream before the work starts; returns the arguments to add."""
    given = dict(zip(arguments, arguments[1:]))
    config = read_config(given["--config"]) if "--config" in given else {}

    def setting(key: str) -> str | None:
        value = given.get(f"--{key}", lookup(config, key))
        return None if value is None else str(value)

    if problem_name == "SuperbKS":
        check_keywords(*(folder(setting(key), f"--{key}") for key in ("prepare_data.gsc1", "prepare_data.gsc1_test")))
    check_upstream(setting("build_upstream.name"), setting("build_upstream.path_or_url"))
    return device_arguments(given=setting("device") is not None)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    return exit_code("superb_tasks.main", run, argv)


if __name__ == "__main__":
    sys.exit(main())
