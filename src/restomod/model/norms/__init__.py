"""Norms of the residual stream, one file each: before attention, before the MLP, and after the last block.

A new norm is a file ``NAME.py`` here, and ``NAME`` in the Literal `restomod.config.model.Norm`. Its function

    build(config: ModelConfig) -> nn.Module

returns a module from (..., D) to (..., D) whose `reset_parameters` sets the initial values of its own parameters
(`nn.Linear` submodules are initialised by the model). It has no buffers. Parameter counts, FLOPs, initialisation,
activation memory and saving follow from the module.
"""
