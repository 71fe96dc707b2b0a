"""The transformer: sizes, the Megatron training model, the lean inference model, the weights between them."""
