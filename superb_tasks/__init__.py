"""SUPERB evaluation of hubert-eff models through S3PRL's own code.

`import superb_tasks` registers the upstream `hubert_eff` with S3PRL in this process as soon as S3PRL is imported: `s3prl.hub.hubert_eff`
and `S3PRLUpstream("hubert_eff", path_or_url=CKPT)` then work. The launchers `python -m superb_tasks.main` and
`python -m superb_tasks.run_downstream` hand over to S3PRL's two programs of the same names.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

from hubert_eff.errors import missing_extra

_registered = False


def require_s3prl() -> None:
    """Raise `UserError` if S3PRL is not installed. Imports nothing."""
    if importlib.util.find_spec("s3prl") is None:
        raise missing_extra("s3prl", "superb", "SUPERB evaluation")


def register() -> None:
    """Patch what S3PRL needs and add `hubert_eff` to `s3prl.hub`, once. It imports S3PRL.

    Raises `UserError` if S3PRL is not installed.
    """
    global _registered
    require_s3prl()
    if _registered:
        return
    _registered = True
    from . import patches

    patches.apply()
    import s3prl.hub

    from .upstream.hubconf import hubert_eff

    # S3PRL has no plug-in hook: all of its programs look an upstream up as an attribute of this module
    s3prl.hub.hubert_eff = hubert_eff


class _WhenImported(MetaPathFinder):
    """Registers the upstream right after the package s3prl is imported, and before any module in it is."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of s3prl with a loader that registers; None for every other module."""
        if fullname != "s3prl":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        loader = spec.loader if spec is not None else None
        if loader is not None:
            load = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                register()

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "s3prl" in sys.modules:
    register()
else:
    sys.meta_path.insert(0, _WhenImported())
