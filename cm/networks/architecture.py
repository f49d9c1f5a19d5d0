"""Networks by name: the arguments that flags give, turned into a module."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from cm.config.parsing import parse_attention, parse_channel_mult, parse_ints
from cm.config.registry import resolve
from cm.config.rows import NETWORKS
from cm.config.rules import check_architecture, inside_patches
from cm.errors import UserError
from cm.networks.classifier import EncoderUNetModel
from cm.networks.edm2 import LOGVAR_CHANNELS, EDM2UNet
from cm.networks.patches import patched
from cm.networks.second_clock import ADDED, JOINED
from cm.networks.song_unet import SongUNet
from cm.networks.unet import UNetModel


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A network as flags describe it (`cm.config.scripts.ModelFlags`); num_classes None is a network without labels.

    two_times: it has a second clock, as a flow map's network does. told_guidance: it takes a guidance, too, and has a
    second prediction behind the first. told_scale: it takes a scale of guidance, without that.
    """

    network: str = "adm"
    image_size: int
    patch_size: int = 1
    num_channels: int
    num_res_blocks: int
    channel_mult: str = ""
    attention_resolutions: str = "16"
    num_heads: int = 1
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    dropout: float = 0.0
    use_checkpoint: bool = False
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_fp16: bool = False
    use_new_attention_order: bool = False
    learn_sigma: bool = False
    in_channels: int = 3
    num_classes: int | None = None
    augment_dim: int = 0
    two_times: bool = False
    told_guidance: bool = False
    told_scale: bool = False

    @property
    def widths(self) -> tuple[float, ...]:
        """Width of each level in units of num_channels."""
        return parse_channel_mult(self.channel_mult, self.image_size)

    @property
    def attention_factors(self) -> tuple[int, ...]:
        """Down-sampling factors with attention."""
        return parse_attention(self.attention_resolutions, self.image_size, len(self.widths))

    @property
    def attended_sides(self) -> tuple[int, ...]:
        """Image sides with attention."""
        return tuple(self.image_size // factor for factor in self.attention_factors)

    @property
    def out_channels(self) -> int:
        """Channels of the prediction."""
        return self.in_channels * (2 if self.learn_sigma or self.told_guidance else 1)

    @property
    def added_clock(self) -> str:
        """The form of the second clock that networks have unless they say otherwise; empty without one.

        Where a network of one time is told a scale, the scale is its second clock.
        """
        return ADDED if self.two_times or self.told_scale else ""


def _shape(a: Architecture) -> dict[str, Any]:
    """The arguments that all U-Nets here have."""
    return {
        "image_size": a.image_size,
        "in_channels": a.in_channels,
        "out_channels": a.out_channels,
        "model_channels": a.num_channels,
        "channel_mult": a.widths,
        "num_res_blocks": a.num_res_blocks,
        "dropout": a.dropout,
        "use_checkpoint": a.use_checkpoint,
    }


def adm(a: Architecture, dropout_resolutions: str = "") -> UNetModel:
    """The U-Net of ADM and of the released consistency models."""
    return UNetModel(
        **_shape(a),
        attention_resolutions=a.attention_factors,
        num_classes=a.num_classes,
        use_fp16=a.use_fp16,
        num_heads=a.num_heads,
        num_head_channels=a.num_head_channels,
        num_heads_upsample=a.num_heads_upsample,
        use_scale_shift_norm=a.use_scale_shift_norm,
        resblock_updown=a.resblock_updown,
        use_new_attention_order=a.use_new_attention_order,
        dropout_resolutions=_dropping(a, dropout_resolutions),
        second_clock=a.added_clock,
    )


def adm_classifier(a: Architecture) -> EncoderUNetModel:
    """The classifier of ADM's guidance: the U-Net's way down and attention pooling; logits of num_classes."""
    return EncoderUNetModel(
        **{**_shape(a), "out_channels": a.num_classes},
        attention_resolutions=a.attention_factors,
        num_head_channels=a.num_head_channels,
        use_scale_shift_norm=a.use_scale_shift_norm,
        resblock_updown=a.resblock_updown,
    )


def ncsnpp(a: Architecture, fourier_scale: float = 16.0) -> SongUNet:
    """NCSN++ as the CIFAR-10 models use it: Fourier embedding, FIR resampling, input pyramid."""
    return _song_unet(
        a,
        embedding="fourier",
        fourier_scale=fourier_scale,
        embedding_mult=2,
        taps=(1, 3, 3, 1),
        input_pyramid=True,
    )


def ddpmpp(a: Architecture, **form: Any) -> SongUNet:
    """DDPM++: positional embedding, box resampling."""
    return _song_unet(a, embedding="positional", embedding_mult=1, taps=(1, 1), input_pyramid=False, **form)


def ddpmpp_scm(a: Architecture) -> SongUNet:
    """DDPM++ as sCM trains it (Lu & Song 2025): adaptive double normalisation; its time input is t itself."""
    return ddpmpp(a, double_norm=True)


def ddpmpp_meanflow(a: Architecture) -> SongUNet:
    """DDPM++ as MeanFlow trains it (Geng et al. 2025): FIR resampling, and two wide embeddings of times, joined."""
    return _song_unet(
        a,
        embedding="positional",
        embedding_mult=2,
        taps=(1, 3, 3, 1),
        input_pyramid=False,
        qkv_first=True,
        second_clock=JOINED if a.two_times or a.told_scale else "",
        told_guidance=a.told_guidance or (a.told_scale and a.two_times),
    )


def edm2(
    a: Architecture,
    logvar_channels: int = LOGVAR_CHANNELS,
    dropout_resolutions: str = "",
    double_norm: bool = False,
) -> EDM2UNet:
    """EDM2's magnitude-preserving U-Net."""
    return EDM2UNet(
        **_shape(a),
        attention_resolutions=a.attended_sides,
        num_heads=a.num_heads,
        num_head_channels=a.num_head_channels,
        dropout_resolutions=_dropping(a, dropout_resolutions),
        num_classes=a.num_classes,
        logvar_channels=logvar_channels,
        double_norm=double_norm,
        second_clock=a.added_clock,
    )


def edm2_scm(
    a: Architecture, logvar_channels: int = LOGVAR_CHANNELS, dropout_resolutions: str = ""
) -> EDM2UNet:
    """EDM2's U-Net as sCM trains it (Lu & Song 2025): positional features of t, adaptive double normalisation."""
    return edm2(a, logvar_channels, dropout_resolutions, double_norm=True)


def _dropping(a: Architecture, dropout_resolutions: str) -> tuple[int, ...] | None:
    """Sides whose blocks drop activations; None for all."""
    if not dropout_resolutions:
        return None
    sides = [a.image_size >> level for level in range(len(a.widths))]
    dropping = parse_ints("dropout_resolutions", dropout_resolutions)
    if unknown := sorted(set(dropping) - set(sides)):
        raise UserError(
            f"--dropout_resolutions {unknown[0]} is not a resolution of the network ({', '.join(map(str, sides))})"
        )
    return tuple(dropping)


def _song_unet(a: Architecture, **form: Any) -> SongUNet:
    form = {"second_clock": a.added_clock} | form
    return SongUNet(
        **_shape(a),
        attention_resolutions=a.attended_sides,
        num_classes=a.num_classes,
        augment_dim=a.augment_dim,
        **form,
    )


def build_network(
    architecture: Architecture, *, classifier: bool = False, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """The network with fresh weights, on torch's default device; UserError names a flag that does not fit.

    classifier: the classifier that goes with the network, not the network. options: what its row brings.
    """
    row = NETWORKS[architecture.network]
    check_architecture(architecture)
    size = architecture.patch_size
    seen = replace(inside_patches(architecture), in_channels=architecture.in_channels * size**2)
    if not classifier:
        return patched(row.load()(seen, **(options or {})), size)
    if not row.classifier:
        raise UserError(f"network {architecture.network} has no classifier; adm has")
    return patched(resolve(row.classifier)(seen), size, images=False)
