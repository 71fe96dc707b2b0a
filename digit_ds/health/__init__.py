"""Looking before leaping: whether the machines that a job was given can do the work."""
