"""Choosing what is not trained: settings of sampling by their scores."""
