"""Metrics of generated images, one a file."""
