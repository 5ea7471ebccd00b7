"""One module per encoder; importing this package registers them all."""

from . import conformer as conformer
from . import squeezeformer as squeezeformer
from . import transformer as transformer
