"""Names only: see `names_only.py`. The members of one enumeration are read during imports."""

from enum import Enum

from names_only import names_of

__getattr__ = names_of("torchvision.transforms")


class InterpolationMode(Enum):
    """The members that transformers maps to those of Pillow."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"
