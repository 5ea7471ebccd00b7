"""SUPERB evaluation of hubert-eff models through S3PRL's own code.

`register()` makes the upstream `hubert_eff` known to S3PRL in this process. The launchers `python -m superb_tasks.main` and
`python -m superb_tasks.run_downstream` call it and then hand over to S3PRL's two programs of the same names.
"""

from __future__ import annotations

import importlib.util

from hubert_eff.errors import missing_extra


def require_s3prl() -> None:
    """Raise `UserError` when S3PRL is not installed. Imports nothing."""
    if importlib.util.find_spec("s3prl") is None:
        raise missing_extra("s3prl", "superb", "SUPERB evaluation")


def register() -> None:
    """Patch what S3PRL needs and add `hubert_eff` to `s3prl.hub`. Call it before other S3PRL modules are imported.

    Raises `UserError` when S3PRL is not installed.
    """
    require_s3prl()
    from . import patches

    patches.apply()
    import s3prl.hub

    from .upstream.hubconf import hubert_eff

    # S3PRL has no plug-in hook: all of its programs look an upstream up as an attribute of this module
    s3prl.hub.hubert_eff = hubert_eff
