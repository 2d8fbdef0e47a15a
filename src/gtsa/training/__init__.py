"""The one training loop, whatever it trains; knows no method."""
