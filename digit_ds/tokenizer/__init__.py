"""Images -> features -> tokens -> images: the frozen encoder, the codebook and the VQGAN."""
