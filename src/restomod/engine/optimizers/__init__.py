"""Optimizers, one file each: ``build`` makes the torch optimizers of a model.

To add one, write ``NAME.py`` here with this function, and add NAME to `Optimizer` in `restomod.config.run`:

    def build(model: GPT, config: OptimConfig, dtype: torch.dtype, distributed: bool) -> list[torch.optim.Optimizer]

``dtype`` is the compute dtype of the matmuls, ``distributed`` whether other processes hold the same gradients. Between
them the optimizers hold every parameter once, each group with its maximum learning rate as ``lr``. Everything else
follows: gradients are divided and NaN refused before ``step`` is called (`restomod.engine.optimizer.Optimizers`),
the state is saved under the names of its parameters, and `restomod.engine.memory` counts its bytes by a step on fake
tensors.
"""
