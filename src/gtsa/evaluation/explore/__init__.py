"""gtsa explore: a local page that shows the features of patches."""
