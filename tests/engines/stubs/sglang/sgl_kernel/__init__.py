"""Names only: see `names_only.py`."""

from names_only import names_of

__version__ = "0.4.10"
__getattr__ = names_of("sgl_kernel")
