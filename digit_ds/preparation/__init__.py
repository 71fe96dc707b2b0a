"""The distributed, restartable offline jobs that tools/ call."""
