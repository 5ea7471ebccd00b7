"""The fairseq plug-in: pass this directory as `common.user_dir` to `fairseq-hydra-train`.

It registers the models `hubert_<encoder>`, `hubert_eff_ctc` and `hubert_eff_aed`, the tasks `hubert_eff_pretraining` and
`hubert_eff_finetuning`, the criteria `hubert_eff`, `hubert_distill` and `hubert_eff_asr`, the optimizers `scaled_adam` and
`fused_adam` and the learning rate schedules `eden` and `noam`, and applies `patches`, which make training robust. Everything that is not
an adapter to fairseq lives in `hubert_eff`.
"""

from __future__ import annotations

from .runtime import patches

patches.apply()

from .criterions import hubert_distill as _distillation  # noqa: E402, F401
from .criterions import hubert_eff as _criterion  # noqa: E402, F401
from .criterions import recognition as _recognition  # noqa: E402, F401
from .lr_schedulers import eden as _eden  # noqa: E402, F401
from .lr_schedulers import noam as _noam  # noqa: E402, F401
from .models import hubert_eff as _models  # noqa: E402, F401
from .models import recognizer as _recognizer  # noqa: E402, F401
from .optim import fused_adam as _fused_adam  # noqa: E402, F401
from .optim import scaled_adam as _scaled_adam  # noqa: E402, F401
from .tasks import finetuning as _finetuning  # noqa: E402, F401
from .tasks import pretraining as _task  # noqa: E402, F401
