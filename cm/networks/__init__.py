"""Networks besides the ADM U-Net of `cm.unet`."""
