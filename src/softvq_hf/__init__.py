"""Efficient image tokenizers and the generators on top of them, native to diffusers."""
