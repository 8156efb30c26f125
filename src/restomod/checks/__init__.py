"""Checks of models (`check`) and machines (`doctor`)."""
