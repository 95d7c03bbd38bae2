"""Where a federation happens: the loop, the pools of workers, the driver, checkpoints."""
