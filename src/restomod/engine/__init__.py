"""One optimizer step: loss, optimizers, schedule, precision, devices, data parallelism, memory."""
