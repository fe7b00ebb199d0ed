"""Names only: see `names_only.py`."""

from names_only import names_of

__getattr__ = names_of("torchvision.transforms.v2")
