"""From views to batches: the order of the images, workers, and memory."""
