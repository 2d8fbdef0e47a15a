"""gtsa compare: methods on the same images, with the same effort."""
