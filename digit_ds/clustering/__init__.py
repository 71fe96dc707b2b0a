"""K-Means over torch.distributed."""
