"""The pipeline as a chain of Slurm jobs; the job scripts are in ``slurm/``."""
