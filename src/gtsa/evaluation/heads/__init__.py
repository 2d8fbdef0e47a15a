"""Heads that evaluations train on patch tokens."""
