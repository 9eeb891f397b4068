"""Diffusion transformers written from their papers, none of diffusers' modules among them."""
