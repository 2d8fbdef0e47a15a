"""gtsa explore: a local page on which features are looked at."""
