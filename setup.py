"""What pyproject.toml cannot say: the folder `configs` is installed as data of the package hubert_eff."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

folders = [Path("configs"), *(path for path in sorted(Path("configs").rglob("*")) if path.is_dir())]
configs = {".".join(("hubert_eff", *folder.parts)): str(folder) for folder in folders}
packages = find_namespace_packages(include=["hubert_eff*", "fairseq_plugins*", "superb_tasks*", "hydra_plugins*"])
setup(packages=[*packages, *configs], package_dir=configs)
