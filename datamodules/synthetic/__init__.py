"""Worlds made in code and written in the real on-disk layouts."""
