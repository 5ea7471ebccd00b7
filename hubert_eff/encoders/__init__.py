"""One module per encoder; importing this package registers them all."""

from . import conformer as conformer
from . import fusionformer as fusionformer
from . import sparseformer as sparseformer
from . import squeezeformer as squeezeformer
from . import transformer as transformer
from . import zipformer as zipformer
