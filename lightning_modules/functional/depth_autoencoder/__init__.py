"""Depth ranges and losses over valid pixels."""
