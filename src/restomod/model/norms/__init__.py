"""Norms of the residual stream, one file each: before attention, before the MLP, and after the last block.

To add a norm, write ``NAME.py`` here and add ``NAME`` to the Literal `restomod.config.model.Norm`. The file has one
function:

    build(config: ModelConfig) -> nn.Module

The module maps (..., D) to (..., D). If it has parameters, its `reset_parameters` sets their initial values; the model
initialises `nn.Linear` submodules. Buffers are not allowed. Parameter counts, FLOPs, initialisation, activation memory
and checkpoints follow from the module.
"""
