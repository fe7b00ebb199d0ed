"""Names only: see `names_only.py`."""

from names_only import names_of

from torchvision.transforms import InterpolationMode as InterpolationMode

__getattr__ = names_of("torchvision.transforms.functional")
