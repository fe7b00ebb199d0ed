"""Names only: see `names_only.py`."""

from names_only import names_of

__version__ = "2.11.0"
__getattr__ = names_of("torchaudio")
