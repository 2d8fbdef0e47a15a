"""Backbones, and their weights in and out."""
