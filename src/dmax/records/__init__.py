"""Prompts and responses from files and from the hub, in the shapes that data sets have."""
