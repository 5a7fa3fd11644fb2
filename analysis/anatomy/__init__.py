"""Instruments for trained models: each measure is a class that takes a model and held-out data."""
