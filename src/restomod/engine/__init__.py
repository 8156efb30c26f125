"""The training step: loss, optimizers, learning-rate schedule, precision, devices, data parallelism, memory."""
