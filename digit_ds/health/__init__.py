"""The doctor: whether the machines that a job was given can do the work."""
