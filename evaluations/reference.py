"""Build or inspect a reference: statistics of a data set, a subset of its images, and where they come from.

    python -m evaluations.reference DATA OUT.npz --protocol adm --image_size 64
    python -m evaluations.reference --inspect FILE.npz

DATA: a folder, zip, npz or prepared store of images. The layout is that of guided-diffusion's reference batches.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cm.commands.common import claimed_output
from cm.config.parsing import at_least, expanded
from cm.data.decode import readable
from cm.errors import UserError
from cm.models.factory import choose_device
from cm.runtime import distributed, job
from cm.runtime.provenance import versions
from cm.storage import filesystem
from cm.storage.downloads import local_copy
from evaluations.features import FeatureNetwork, add_feature_flags, current_name, feature_spec
from evaluations.npz_io import (
    ImageSet,
    Reference,
    array_header,
    open_images,
    open_reference,
    write_reference,
)
from evaluations.own_features import PROTOCOL
from evaluations.pipeline import extract, gather_rows, image_batches
from evaluations.protocols import PROTOCOLS, Protocol, choose_protocol, measuring


def build_reference(
    images: ImageSet,
    network: FeatureNetwork,
    protocol: Protocol,
    out: str,
    *,
    num_images: int = 10_000,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Write the reference of a set to `out` and return its provenance. Collective.

    Statistics are of all images; `num_images` of them, drawn by `seed`, are stored for precision and recall.
    """
    network.check(images.shape, images.path)
    count = images.shape[0]
    chosen = np.zeros(count, bool)
    chosen[np.random.default_rng(seed).permutation(count)[:num_images]] = True
    kept = [np.empty((0, *images.shape[1:]), np.uint8)]

    def batches() -> Iterator[tuple[range, np.ndarray]]:
        for rows, batch in image_batches(images, batch_size, "reference"):
            kept.append(batch[chosen[rows.start : rows.stop]])
            yield rows, batch

    extracted = extract(batches(), network, kinds=network.dims, keep=False, source=images.path)
    subset = gather_rows(torch.from_numpy(np.concatenate(kept)))
    meta = {
        "protocol": protocol.name,
        "features": network.name,
        "features_sha256": network.sha256,
        "transform": network.transform,
        "count": count,
        "images": int(chosen.sum()),
        "seed": seed,
        "shape": list(images.shape[1:]),
        "source": images.path,
        "versions": versions(),
    }
    if distributed.is_main():
        meta["source_sha256"] = images.sha256()
        gaussians = {kind: tuple(a.cpu().numpy() for a in extracted.gaussian(kind)) for kind in network.dims}
        write_reference(out, gaussians, meta, subset.numpy() if num_images else None)
    return distributed.broadcast_object(meta)


def inspect(path: str) -> dict[str, Any]:
    """What a reference file holds, as plain JSON."""
    reference = open_reference(path)
    arrays = {}
    if str(path).lower().endswith(".npz"):
        with readable(path), filesystem.open_npz(path) as file:
            # arr_0 may be large: its shape is known from its header.
            shapes = {name: list(array_header(file, name)[0]) for name in file.files if name != "arr_0"}
            arrays = {name: shape for name, shape in shapes.items() if shape}
    if reference.images:
        arrays["arr_0"] = list(reference.images.shape)
    return {
        "path": path,
        "sha256": reference.sha256(),
        "statistics": sorted(reference.statistics),
        "images_for_precision_and_recall": reference.images.shape[0] if reference.images else 0,
        "arrays": arrays,
        "meta": reference.meta,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="DATA", type=expanded, nargs="?", help="images")
    parser.add_argument("out", metavar="OUT.npz", type=expanded, nargs="?", help="file to write")
    parser.add_argument(
        "--inspect", type=expanded, default="", metavar="FILE", help="print what a reference holds, as JSON"
    )
    parser.add_argument(
        "--protocol",
        default="",
        type=current_name,
        choices=("", *PROTOCOLS),
        help="what the reference is for",
    )
    parser.add_argument(
        "--image_size",
        type=at_least(0),
        default=0,
        help="centre-crop to this side as training does; 0: as is",
    )
    parser.add_argument(
        "--num_images",
        type=at_least(0),
        default=10_000,
        help="images stored for precision and recall; 0: none",
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the choice of these images")
    parser.add_argument("--overwrite", nargs="?", const="True", default="False", choices=("True", "False"))
    add_feature_flags(parser)
    args = parser.parse_args()
    if args.inspect:
        print(json.dumps(inspect(args.inspect), indent=2))
        return
    if not args.data or not args.out:
        raise UserError("give DATA and OUT.npz, or --inspect FILE")
    if not args.out.endswith(".npz"):
        raise UserError(f"{args.out}: the name of a reference must end in .npz")
    if args.num_images == 1:
        raise UserError("--num_images 1: precision and recall need at least 2 images; 0 stores none")
    distributed.setup_dist()
    out = Path(args.out)
    with claimed_output(out.parent, [out.name], args.overwrite == "True", "OUT.npz"):
        build(args, out)


def build(args: argparse.Namespace, out: Path) -> None:
    """The reference of DATA, as the flags say."""
    spec = feature_spec(args)
    protocol, _ = choose_protocol(args.protocol, spec)
    images = open_images(str(local_copy(args.data, flag="DATA")), args.image_size)
    known, device = Reference(images.path, {}, images, None), choose_device(args.device)
    network, _ = measuring(spec, protocol, True, known, device, sha256=args.weights_sha256)
    if protocol.features not in (network.name, PROTOCOL):
        raise UserError(f"protocol {protocol.name} uses {protocol.features}, --features gives {network.name}")
    sizes = {"num_images": args.num_images, "seed": args.seed, "batch_size": args.batch_size}
    meta = build_reference(images, network, protocol, str(out), **sizes)
    if distributed.is_main():
        print(
            f"{out}: {meta['count']:,} images of {meta['source']}, {meta['images']:,} of them stored",
            flush=True,
        )


if __name__ == "__main__":
    job.run_main(main)
