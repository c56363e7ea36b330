"""What lies on disk: reading checkpoints as hostile input, writing them durably."""
