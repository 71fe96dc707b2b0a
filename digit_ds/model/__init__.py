"""The autoregressive transformer: sizes, the Megatron training model, the lean inference model, weights between them."""
