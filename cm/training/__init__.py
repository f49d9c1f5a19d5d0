"""The training loop: state, optimizers, averages, precision, sharding, resumption."""
