"""Rewrite what a located place holds, in closed form."""
