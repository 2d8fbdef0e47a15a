"""How good are features: metrics, predictions and pictures."""
