"""What a data set is like, before anything is chosen for it: number, side, channels and classes of its images."""

from dataclasses import dataclass

from cm.data.dataset import sampled_channels
from cm.data.decode import read_header
from cm.data.labels import Labels
from cm.data.sources import Source, open_source
from cm.errors import UserError

SAMPLE = 64
# Fewer images than this per class: the text before the underscore is hardly a class
PER_CLASS = 10


@dataclass(frozen=True)
class DataFacts:
    """count images of `side` x `side` pixels (0: not all alike, or not square), channels, and class names.

    array: there are no files to decode.
    """

    count: int
    side: int
    channels: int
    classes: tuple[str, ...]
    label_origin: str
    array: bool

    @property
    def labelled(self) -> bool:
        """Whether there are two classes or more, with enough images each to learn from."""
        return len(self.classes) > 1 and self.count >= PER_CLASS * len(self.classes)


def describe(path: str, labels: str = "auto", channels: int = 0) -> DataFacts:
    """The facts of a data set; of files, a sample of headers is read."""
    source = open_source(path)
    table: Labels = source.labels(labels)
    return DataFacts(
        len(source),
        common_side(source),
        channels or sampled_channels(source, True),
        table.classes,
        table.origin,
        source.shape is not None,
    )


def common_side(source: Source) -> int:
    """The side of square images that are all of one size, judged by a sample; 0 where there is none."""
    if source.shape is not None:
        sizes = {source.shape[:2]}
    else:
        sizes = set()
        for index in sorted({i * len(source) // SAMPLE for i in range(SAMPLE)}):
            try:
                header = read_header(source.read(index), source.name(index))
            except UserError:
                continue
            sizes.add((header.height, header.width))
    height, width = sizes.pop() if len(sizes) == 1 else (0, 1)
    return height if height == width else 0
