"""Activations of the MLP, one file each.

To add an activation, write ``NAME.py`` here and add ``NAME`` to the Literal `restomod.config.model.Activation`. The
file has one function:

    build(config: ModelConfig) -> nn.Module

The module maps (..., I) to (..., I), with I = ``config.inner_size``. An activation whose name ends in "glu" is gated:
it maps (..., 2 I) to (..., I). Parameters follow the rules in `restomod.model.norms`.
"""
