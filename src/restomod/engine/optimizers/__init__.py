"""Optimizers, one file each, with a function ``build`` that returns the torch optimizers of a model.

To add an optimizer, write ``NAME.py`` here and add ``NAME`` to the Literal `restomod.config.run.Optimizer`. The file
has one function:

    def build(model: GPT, config: OptimConfig, dtype: torch.dtype, distributed: bool) -> list[torch.optim.Optimizer]

``dtype`` is the compute dtype of matmuls. ``distributed`` is whether there are several ranks. Together the optimizers
contain every parameter once, and the ``lr`` of each group is its maximum learning rate. Gradient clipping, skipped
updates (`restomod.engine.optimizer.Optimizers`), checkpoints and the memory estimate need no further code.
"""
