"""What slurm/digits.yaml does, as a scale of the demo: the small pictures with the recipes as they are."""

from digit_ds.demo.stages import Scale

DIGITS = Scale(
    pictures="digits",
    encoder_steps=400,
    vqgan_steps=400,
    codes=256,
    kmeans_iterations=20,
    copies=0,
    resize=35,
    views=8,
    first_stage=(),
    pixels=(),
    temperature=0.9,
    guidance=2.5,
    decoder_top_p=0.8,
    per_class=50,
    probe_passes=100,
)
