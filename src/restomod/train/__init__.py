"""The training step and all around it: loss, schedule, optimizer, checkpoints, metrics, the loop."""
