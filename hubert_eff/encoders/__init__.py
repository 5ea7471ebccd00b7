"""One module per encoder; importing this package registers them all, and those that other packages or $HUBERT_EFF_IMPORT name."""

from . import conformer as conformer
from . import fusionformer as fusionformer
from . import sparseformer as sparseformer
from . import squeezeformer as squeezeformer
from . import transformer as transformer
from . import zipformer as zipformer
from .registry import import_others

import_others()
