"""Networks besides the ADM U-Net of `cm.networks.unet`."""
