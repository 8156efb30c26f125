"""What a run takes: memory, time, money, final loss."""
