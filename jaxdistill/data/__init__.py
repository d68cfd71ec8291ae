"""From text to masked batches: sources, tokenize, batching, masking, pipeline. numpy only, no jax."""
