"""Ways to run many pieces of work at once; knows nothing of tensors."""
