"""A real pretrained model on a CPU: SmolLM2-135M-Instruct, its vocabulary cut to one task."""
