"""Replicas of a model, on one machine or on many, by Ray Data."""
