"""Stateless tensor maths: the ground floor. No Lightning, no files, nobody above."""
