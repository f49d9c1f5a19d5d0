"""What a run will need: memory per GPU, time, GPU-hours; from its configuration, without running it."""
