"""`hubert-eff doctor`: versions, known breakages of this environment and the fix for each."""

from __future__ import annotations

import argparse
import json
import sys

from ..errors import UserError

LABEL = {"broken": "BROKEN ", "warning": "warning", "missing": "missing"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hubert-eff doctor`."""
    parser.epilog = (
        f"{parser.epilog or ''}\nExit code: 0 when what is installed works, 1 when something is broken; optional parts may be missing."
    )
    parser.add_argument("--json", action="store_true", help="print the diagnosis as JSON")
    tune = "measure for ten seconds, with nothing else running, which form of each float layer is fastest here; inference then uses it"
    parser.add_argument("--tune", action="store_true", help=tune)


def run(args: argparse.Namespace) -> int:
    """Diagnose and print; returns 0 when usable, 1 when something is broken."""
    from ..reports.environment import diagnose, read_environment, report

    if args.tune:
        _tune()
    environment = read_environment()
    findings = diagnose(environment)
    values = report(environment, findings)
    code = 0 if values["usable"] else 1
    if args.json:
        print(json.dumps(values, indent=2))
        return code
    # rich is not used here, since it may be the missing package
    rows = {"python": f"{values['python']} ({values['platform']})"}
    rows |= {name: version or "-" for name, version in values["packages"].items()}
    rows["threads"] = f"{values['threads'] or '-'} of {values['cpus']} CPUs"
    if processor := values["processor"]:
        rows["CPU"] = f"{processor['name']} ({processor['vendor']}; {' '.join(processor['sets']) or 'no known instruction sets'})"
    rows |= {f"  {name}": form for name, form in values["float_layers"].items()}
    rows["GPU"] = ", ".join(values["gpus"]) or "none"
    if errors := values["bfloat16_errors"]:
        rows["bfloat16"] = f"grouped convolutions off by {errors['torch']:.1%} in torch, {errors['hubert_eff']:.1%} here"
    rows["one-bit layers"] = "; ".join(f"{operations}: {kernel}" for operations, kernel in values["one_bit"].items()) or "-"
    rows["C++ compiler"] = values["compiler"] or "none"
    rows |= values["variables"]
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}} {value}")
    print()
    for finding in findings:
        print(f"{LABEL[finding.status]}  {finding.what}\n         fix: {finding.fix}")
    if values["usable"]:
        print("Usable: no known breakage." if not findings else "Usable: everything that is installed works.")
    else:
        print("Not usable as it is: apply the fixes above.")
    return code


def _tune() -> None:
    import torch

    from ..layers.choice import keep, tuned_file
    from ..layers.linear import _PRODUCT
    from ..profiling.tuning import tune
    from ..utils.files import writable

    if _PRODUCT is None:
        raise UserError("--tune has nothing to choose from, because this torch is built without oneDNN")
    threads = torch.get_num_threads()
    writable(tuned_file(threads).parent)  # before the work
    print(f"kept in {keep(tune(), threads)}", file=sys.stderr)
