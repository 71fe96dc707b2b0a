"""Process topology: launchers, Megatron groups, the mpu that DeepSpeed is given, progress on rank 0."""
