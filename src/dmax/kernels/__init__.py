"""Implementations chosen for the hardware at hand, each with a plain PyTorch twin."""
