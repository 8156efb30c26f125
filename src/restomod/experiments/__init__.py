"""Planning of single runs and sweeps over many runs."""
