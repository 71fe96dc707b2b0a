"""FID, Inception Score and the linear probe."""
