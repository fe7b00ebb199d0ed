"""SDAR: Qwen3's networks, dense and with experts, trained to decode blocks (arXiv 2510.06303)."""
