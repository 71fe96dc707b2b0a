"""Codebooks by K-Means: Lloyd's algorithm over any number of processes, on features larger than memory."""
