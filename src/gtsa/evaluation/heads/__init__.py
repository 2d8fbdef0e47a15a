"""Networks that evaluations train on patch tokens."""
