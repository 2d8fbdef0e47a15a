"""gtsa compare: methods on the same images, with equal tuning."""
