"""Labelled synthetic videos of moving digits: data, metrics and the pieces of a small text-to-video pipeline."""
