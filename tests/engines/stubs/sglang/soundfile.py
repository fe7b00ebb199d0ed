"""Names only: see `names_only.py`. One of them is asked while SGLang's server is imported."""

from names_only import names_of

__getattr__ = names_of("soundfile")


def available_formats() -> dict[str, str]:
    """No format of audio is read."""
    return {}
