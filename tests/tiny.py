"""Models that train in a moment, for tests of something else."""

MODEL_8 = dict(
    resolution=8, num_slots=2, slot_dim=2, octaves=2, cnn_channels=4, encoder_width=8, encoder_layers=1, query_width=8,
    query_hidden=8, slot_width=8, slot_hidden=8, decoder_heads=2, output_hidden=(8,), pixels_per_step=0,
)  # fmt: skip
MODEL_16 = dict(
    resolution=16, num_slots=3, slot_dim=4, cnn_channels=8, encoder_width=16, encoder_layers=1, query_width=16,
    query_hidden=16, slot_width=16, slot_hidden=16, decoder_heads=2, output_hidden=(16,), pixels_per_step=0,
)  # fmt: skip
