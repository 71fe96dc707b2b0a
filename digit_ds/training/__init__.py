"""Training: DeepSpeed engine, loop, schedule, checkpoints, metrics, preemption."""
