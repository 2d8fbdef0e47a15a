"""From files to batches of views, and labels."""
