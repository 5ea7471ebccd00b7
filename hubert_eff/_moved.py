"""Modules that have moved: importing one by its old name returns the module under its new name, with a warning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

# old name -> new name
MOVED = {
    "hubert_eff.files": "hubert_eff.utils.files",
    "hubert_eff.progress": "hubert_eff.utils.progress",
    "hubert_eff.doctor": "hubert_eff.reports.environment",
    "hubert_eff.steps": "hubert_eff.recipes.base",
    "hubert_eff.pretraining": "hubert_eff.recipes.pretrain",
    "hubert_eff.binarize_recipe": "hubert_eff.recipes.binarize",
    "hubert_eff.demo": "hubert_eff.recipes.demo",
    "hubert_eff.model": "hubert_eff.models.hubert",
    "hubert_eff.frontend": "hubert_eff.models.extractor",
    "hubert_eff.logmel": "hubert_eff.models.logmel",
    "hubert_eff.masking": "hubert_eff.models.masking",
    "hubert_eff.checkpoint": "hubert_eff.checkpoints.load",
    "hubert_eff.onnx_export": "hubert_eff.exporting.onnx",
    "hubert_eff.card": "hubert_eff.reports.model_card",
    "hubert_eff.extraction": "hubert_eff.inference.extraction",
    "hubert_eff.fusing": "hubert_eff.models.fuse",
    "hubert_eff.live": "hubert_eff.streaming.live",
    "hubert_eff.labels.audio": "hubert_eff.data.audio",
    "hubert_eff.labels.listing": "hubert_eff.data.sources",
    "hubert_eff.labels.checking": "hubert_eff.data.checking",
    "hubert_eff.labels.imports": "hubert_eff.data.lhotse_kaldi",
    "hubert_eff.labels.manifest": "hubert_eff.data.manifest",
    "hubert_eff.labels.transcripts": "hubert_eff.data.transcripts",
    "hubert_eff.labels.pool": "hubert_eff.labels.workers",
    "hubert_eff.labels.targets": "hubert_eff.labels.make",
    "hubert_eff.corpus.espeak": "hubert_eff.data.synthetic.espeak",
    "hubert_eff.corpus.demo": "hubert_eff.data.synthetic.sentences",
    "hubert_eff.corpus": "hubert_eff.data.synthetic",
    "hubert_eff.profiling.page": "hubert_eff.reports.page",
    "hubert_eff.profiling.frontier": "hubert_eff.reports.frontier",
    "hubert_eff.profiling.table1": "hubert_eff.reports.table1",
    "hubert_eff.profiling.table2": "hubert_eff.reports.table2",
    "hubert_eff.profiling.bench_report": "hubert_eff.reports.bench",
    "hubert_eff.profiling.report": "hubert_eff.reports.tables",
    "hubert_eff.analysis.training": "hubert_eff.reports.training_log",
    "hubert_eff.profiling.needs": "hubert_eff.profiling.training_cost",
    "hubert_eff.quant.report": "hubert_eff.quant.summary",
    "hubert_eff.quant.runtime.loader": "hubert_eff.kernels.loader",
    "hubert_eff.layers.weights": "hubert_eff.layers.zipformer_attention",
    "fairseq_plugins.patches": "fairseq_plugins.runtime.patches",
    "fairseq_plugins.stopping": "fairseq_plugins.runtime.stopping",
    "fairseq_plugins.dataset": "fairseq_plugins.data.dataset",
    "fairseq_plugins.buckets": "fairseq_plugins.data.buckets",
    "fairseq_plugins.transcripts": "fairseq_plugins.data.transcripts",
    "fairseq_plugins.checks": "fairseq_plugins.data.checks",
    "superb_tasks.layouts": "superb_tasks.data.layouts",
    "superb_tasks.prepare": "superb_tasks.data.prepare",
    "superb_tasks.corpora": "superb_tasks.data.generators",
    "superb_tasks.corpus": "superb_tasks.data.corpus",
    "superb_tasks.utterances": "superb_tasks.data.utterances",
    "superb_tasks.runner": "superb_tasks.running.runner",
    "superb_tasks.records": "superb_tasks.running.records",
    "superb_tasks.launch": "superb_tasks.running.launch",
    "superb_tasks.cache": "superb_tasks.running.cache",
    "superb_tasks.scoring": "superb_tasks.results.scoring",
    "superb_tasks.significance": "superb_tasks.results.significance",
    "superb_tasks.submission": "superb_tasks.results.submission",
}


class _Alias(Loader):
    def __init__(self, target: str) -> None:
        self.target = target

    def create_module(self, spec: ModuleSpec) -> None:
        return None  # an empty module, which is replaced at once

    def exec_module(self, module: ModuleType) -> None:
        warnings.warn(f"{module.__name__} is now {self.target}", DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = importlib.import_module(self.target)


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return spec_from_loader(fullname, _Alias(MOVED[fullname])) if fullname in MOVED else None


def install() -> None:
    """Make `import` find the old names."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
