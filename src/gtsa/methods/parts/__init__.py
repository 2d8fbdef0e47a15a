"""What methods are made of; imports PyTorch alone."""
