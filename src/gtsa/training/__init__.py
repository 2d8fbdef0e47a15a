"""The one training loop, its checkpoints and logs. It knows no method."""
