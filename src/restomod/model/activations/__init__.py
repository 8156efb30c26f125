"""Activations of the MLP, one file each.

A new activation is a file ``NAME.py`` here, and ``NAME`` in the Literal `restomod.config.model.Activation`. Its
function

    build(config: ModelConfig) -> nn.Module

returns a module from (..., I) to (..., I), I = ``config.inner_size``; where its name ends in "glu" it is gated, from
(..., 2 I) to (..., I). For parameters see `restomod.model.norms`.
"""
