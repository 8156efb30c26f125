"""One optimizer step: loss, optimizers, learning rate, precision, devices, several processes, memory."""
