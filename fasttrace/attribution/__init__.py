"""What a patch would do, read off gradients: every site, head, token and channel at once."""
