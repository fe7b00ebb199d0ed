"""DMax on the engines that clusters run: its strategies inside vLLM and SGLang, replicas by Ray."""
