"""restomod: GPT-2, reproduced from scratch with modern parts.

    from pathlib import Path

    import restomod
    from restomod.train.loop import train

    config = restomod.preset("quickstart")
    train(config, Path("runs/mine"))
    (texts,) = restomod.sample_texts("runs/mine", ["def "], 3, config.sampling, seed=1)

The names in `__all__` are the public API. Importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = {  # public name -> module that defines it
    "RunConfig": "restomod.config.run",
    "ModelConfig": "restomod.config.run",
    "DataConfig": "restomod.config.run",
    "OptimConfig": "restomod.config.run",
    "SamplingConfig": "restomod.config.run",
    "UserError": "restomod.utils.errors",
    "preset": "restomod.config.presets",
    "prepare_folder": "restomod.data.prepare.run",
    "prepare_text": "restomod.data.prepare.text_cache",
    "Batches": "restomod.data.batches",
    "gpt2_tokenizer": "restomod.data.tokenizer",
    "GPT": "restomod.model.gpt",
    "build_model": "restomod.model.gpt",
    "load_model": "restomod.model.hf_io",
    "open_model": "restomod.runs.open_model",
    "find_model": "restomod.runs.open_model",
    "save_model": "restomod.model.hf_io",
    "sample_texts": "restomod.generate.text",
    "open_run": "restomod.runs.reader",
    "validation_loss": "restomod.evals.validation",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'restomod' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
