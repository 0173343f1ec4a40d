"""Where weights come from: every kind of model on disk or in memory as named, lazily read tensors."""
