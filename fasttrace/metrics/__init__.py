"""Scores of pictures and latents, as frozen records."""
