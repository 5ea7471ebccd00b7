"""The doctor on faked environments: every known breakage is found, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hubert_eff.cli import main
from hubert_eff.reports import environment as doctor
from hubert_eff.reports.environment import Environment, diagnose, report

SOUND = {
    "hubert-eff": "0.1.0",
    "torch": "2.8.0+cu128",
    "numpy": "2.4.6",
    "soundfile": "0.14.0",
    "safetensors": "0.8.0",
    "rich": "15.0.0",
    "pyyaml": "6.0.3",
    "torchaudio": "2.8.0",
    "soxr": "1.1.0",
    "scikit-learn": "1.9.1",
    "espeakng-loader": "0.2.4",
    "fairseq-fixed": "0.12.3.1",
    "omegaconf": "2.3.0",
    "hydra-core": "1.3.2",
    "setuptools": "80.9.0",
    "s3prl": "0.4.18",
    "transformers": "4.57.6",
    "huggingface_hub": "0.36.2",
    "jiwer": "4.0.0",
    "matplotlib": "3.10.8",
    "onnx": "1.20.0",
    "onnxruntime": "1.23.2",
    "pip": "23.2.1",
}


def environment(python=(3, 11, 7), without=(), compiler="/usr/bin/g++", **changes) -> Environment:
    packages = {**SOUND, **{name.replace("__", "-"): version for name, version in changes.items()}}
    return Environment(python, {k: v for k, v in packages.items() if k not in without}, cpus=2, compiler=compiler)


def test_a_sound_environment_has_no_findings():
    assert diagnose(environment()) == []
    assert diagnose(environment(python=(3, 12, 1))) == []


@pytest.mark.parametrize(
    "changes, what, fix",
    [
        ({"python": (3, 9, 1)}, "older than 3.10", "Python 3.11"),
        ({"torch": "2.3.1", "torchaudio": "2.3.1"}, "torch 2.3.1 is older than 2.4", "torch>=2.4"),
        ({"without": ["soundfile"]}, "soundfile is not installed", "pip install hubert-eff"),
        ({"torchaudio": "2.7.1"}, "torchaudio 2.7.1 does not belong to torch 2.8.0", "torchaudio==2.8.*"),
        ({"torch": "2.9.1", "torchaudio": "2.9.0"}, "gone from torchaudio 2.9", "torch==2.8.0 torchaudio==2.8.0"),
        ({"torch": "2.10.0", "torchaudio": "2.11.0"}, "gone from torchaudio 2.9", "torch==2.8.0 torchaudio==2.8.0"),
        ({"torch": "2.10.0"}, "does not belong to torch 2.10.0", "torch==2.8.0 torchaudio==2.8.0"),
        ({"torch": "2.10.0", "torchaudio": "2.9.1", "without": ["s3prl"]}, "does not belong", "torchaudio==2.10.*"),
        ({"without": ["torchaudio"]}, "no torchaudio", "torchaudio==2.8.0"),
        ({"without": ["fairseq-fixed"], "fairseq": "0.12.2"}, "does not import on Python 3.11", "pip uninstall -y fairseq"),
        (
            {"without": ["fairseq-fixed"], "fairseq": "0.12.2", "python": (3, 10, 4)},
            "needs omegaconf < 2.1",
            "pip uninstall -y fairseq",
        ),
        ({"fairseq": "0.12.2"}, "both installed", "PIP_CONSTRAINT"),
        ({"omegaconf": "2.0.6"}, "omegaconf >= 2.1.1, found 2.0.6", "omegaconf>=2.1.1"),
        ({"hydra__core": "1.0.7"}, "hydra-core >= 1.3.2, found 1.0.7", "hydra-core>=1.3.2"),
        ({"setuptools": "81.0.0"}, "pkg_resources", "setuptools>=65.5.1,<81"),
        ({"without": ["setuptools"]}, "pkg_resources", "setuptools>=65.5.1,<81"),
        ({"transformers": "5.0.0rc1"}, "transformers 5", "transformers<5"),
        ({"huggingface_hub": "1.2.0"}, "HfFolder", "huggingface_hub<1"),
    ],
)
def test_breakage(changes, what, fix):
    broken = [f for f in diagnose(environment(**changes)) if f.status == "broken"]
    assert len(broken) == 1
    assert what in broken[0].what and fix in broken[0].fix


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"fairseq__fixed": "0.12.4"}, "not the tested 0.12.3.1"),
        ({"s3prl": "0.4.17"}, "not the tested 0.4.18"),
        ({"python": (3, 13, 0)}, "Python 3.13 is newer"),
        ({"catalyst": "21.5"}, "catalyst 21.5"),
    ],
)
def test_warning(changes, what):
    (finding,) = diagnose(environment(**changes))
    assert finding.status == "warning" and what in finding.what


def test_versions_matter_only_to_what_is_installed():
    new = {"torch": "2.13.0", "torchaudio": "2.11.0", "transformers": "5.1.0", "huggingface_hub": "1.3.0", "setuptools": "82.0.1"}
    findings = diagnose(environment(without=["s3prl", "fairseq-fixed", "omegaconf", "hydra-core"], **new))
    assert [f.status for f in findings] == ["missing", "missing"]


def test_missing_extras_are_no_breakage_and_name_the_extra():
    core = environment(without=set(SOUND) - {*doctor.CORE, "hubert-eff", "pip"}, compiler=None)
    findings = diagnose(core)
    assert [f.status for f in findings] == ["missing"] * 7
    assert [re.search(r"'hubert-eff\[(\w+)\]'", f.fix)[1] for f in findings[:6]] == ["data", "fairseq", "superb", "text", "plot", "onnx"]
    assert "C++ compiler" in findings[6].what
    assert findings[1].fix.startswith("PIP_CONSTRAINT=")  # pip 23
    assert report(core, findings)["usable"]


def test_constraint_of_the_build_depends_on_pip():
    (finding,) = diagnose(environment(without=["fairseq-fixed"], pip="25.3"))
    assert "--build-constraint" in finding.fix


CORE_ONLY = """
import sys
from importlib import abc, metadata

HIDDEN = {*sys.argv[1].split(",")}
version = metadata.version


class Hidden(abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


def core_only(name):
    if name.lower().replace("-", "_") in HIDDEN:
        raise metadata.PackageNotFoundError(name)
    return version(name)


sys.meta_path.insert(0, Hidden())
metadata.version = core_only
from hubert_eff.cli import main
from hubert_eff.reports import environment

environment._lock = lambda: None  # as of an installed package
sys.exit(main(["doctor", "--json"]))
"""


def test_every_fix_in_a_core_only_environment_is_a_command():
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    extras = re.findall(r"^(\w+) = \[", pyproject.partition("[project.optional-dependencies]")[2].partition("\n[")[0], re.M)
    hidden = {name.replace("-", "_") for name in doctor.PACKAGES if name not in (*doctor.CORE, "hubert-eff", "pip")}
    hidden |= {"sklearn", "espeakng_loader", "fairseq_cli", "hydra"}
    done = subprocess.run([sys.executable, "-c", CORE_ONLY, ",".join(hidden)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    missing = [f for f in found["findings"] if f["status"] == "missing" and "compiler" not in f["what"]]
    assert len(missing) == 6 and found["usable"]
    for finding in missing:
        for command in finding["fix"].split(" && "):
            words = shlex.split(command)
            assert words[:2] == ["pip", "install"] and not any("requirements" in word for word in words)
        [extra] = re.findall(r"'hubert-eff\[(\w+)\]'", finding["fix"])
        assert extra in extras


def test_threads_and_broken_torch():
    sound = environment()
    crowded = Environment(sound.python, sound.packages, cpus=2, compiler="g++", variables={"OMP_NUM_THREADS": "16"})
    (finding,) = diagnose(crowded)
    assert finding.status == "warning" and finding.fix == "export OMP_NUM_THREADS=2"
    (finding,) = diagnose(Environment(sound.python, sound.packages, compiler="g++", torch_error="OSError: libcudnn.so.9"))
    assert finding.status == "broken" and "libcudnn" in finding.what and finding.fix == "pip install --force-reinstall torch==2.8.0"


@pytest.mark.parametrize(
    "errors, status, what",
    [
        ((0.31, 0.002), "warning", "off by 31% on this CPU; those of hubert-eff are right (0.2%)"),
        ((0.31, 0.3), "broken", "off by 30% on this CPU"),
        ((float("nan"), 0.002), "warning", "nan%"),
    ],
)
def test_noise_of_a_cpu_in_bfloat16(errors, status, what):
    (finding,) = diagnose(dataclasses.replace(environment(), bfloat16_errors=errors))
    assert finding.status == status and what in finding.what
    assert diagnose(dataclasses.replace(environment(), bfloat16_errors=(0.003, 0.003))) == []


def test_noise_is_measured(monkeypatch):
    torchs, ours = doctor.convolution_errors()
    assert 0.0 < ours < 0.01 and torchs > 0.0  # torch's own is noise on some CPUs
    exact = torch.nn.functional.conv1d

    def noisy(x, weight, groups):
        y = exact(x, weight, groups=groups)
        return y if x.dtype == torch.float32 or weight.size(2) % 32 else torch.randn_like(y)

    monkeypatch.setattr(torch.nn.functional, "conv1d", noisy)
    torchs, ours = doctor.convolution_errors()
    assert torchs > 0.5 and ours < 0.01


def test_kernels_of_one_bit_layers(monkeypatch):
    monkeypatch.setenv("HUBERT_EFF_KERNEL", "torch")
    assert doctor.one_bit_kernels()[0] == {"all operations": "torch"}
    monkeypatch.setenv("HUBERT_EFF_KERNEL", "avx3")
    found, error = doctor.one_bit_kernels()
    assert not found and "unknown kernel in HUBERT_EFF_KERNEL 'avx3'" in error
    (finding,) = diagnose(dataclasses.replace(environment(), one_bit_error=error))
    assert finding.status == "broken" and finding.fix == "unset HUBERT_EFF_KERNEL"
    slow = dataclasses.replace(environment(), one_bit={"all operations": "torch"}, one_bit_error="no C++ compiler was found")
    (finding,) = diagnose(slow)
    assert finding.status == "warning" and "g++" in finding.fix


@pytest.mark.parametrize("changes, code", [({}, 0), ({"s3prl": "0.4.17"}, 0), ({"transformers": "5.0.0"}, 1)])
def test_command(changes, code, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "read_environment", lambda: environment(**changes))
    assert main(["doctor"]) == code
    text = capsys.readouterr().out
    assert "2.8.0+cu128" in text and text.count("fix:") == len(changes)
    assert main(["doctor", "--json"]) == code
    values = json.loads(capsys.readouterr().out)
    assert values["usable"] is (code == 0) and len(values["findings"]) == len(changes)
    assert values["packages"]["torch"] == "2.8.0+cu128" and values["packages"]["catalyst"] is None


def test_this_environment(capsys):
    assert main(["doctor", "--json"]) in (0, 1)
    values = json.loads(capsys.readouterr().out)
    assert values["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert values["threads"] == torch.get_num_threads()
    assert values["bfloat16_errors"]["hubert_eff"] < doctor.NOISE
    main(["doctor"])
    text = capsys.readouterr().out
    assert "grouped convolutions off by" in text and "one-bit layers" in text
