"""From a configuration or a file to a denoiser."""
