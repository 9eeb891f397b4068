"""Thresholds from an error budget: `calibrate.py` is where to start reading."""
