"""What one rank is: model, data, optimizer, checkpoint, the training step, and the Ray actor around it."""
