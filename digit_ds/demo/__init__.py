"""The embedded default: a complete run on scikit-learn's handwritten digits."""
