"""From an image to its views: crops, colours, rotation, normalisation."""
