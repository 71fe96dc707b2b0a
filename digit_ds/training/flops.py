"""FLOPs of a training image and peaks of GPUs; imports no torch, so that a chain's cost is printed at once."""

from digit_ds.model.spec import TransformerSpec

PEAKS = {"H200": 989.0, "H100": 989.0, "H800": 989.0, "A100": 312.0, "A800": 312.0, "L40S": 362.0, "V100": 125.0}
"""Dense bf16 (fp16 on V100) TFLOP/s by NVIDIA's data sheets, found by the device's name."""


def flops_per_image(spec: TransformerSpec) -> float:
    """Floating-point operations of one training image, forward and backward: 6 a weight and token, plus attention.

    Matrix weights only (tables that are looked up do no arithmetic), output matrix on the positions that have a
    target; attention counted whole (12 x D x T a token and layer), as is customary, though half of it is masked.
    Recomputation is not counted: it is time, not work.
    """
    tokens = spec.sequence_length
    per_layer = 4 * spec.width**2 + (2 if spec.activation == "gelu" else 3) * spec.width * spec.feed_forward
    output = spec.vocabulary.output_size * spec.width
    attention = 12.0 * spec.layers * spec.width * tokens
    return tokens * (6.0 * spec.layers * per_layer + attention) + (1 + spec.tokens) * 6.0 * output
