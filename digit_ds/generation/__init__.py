"""Samplers, and the way from prior to pictures."""
