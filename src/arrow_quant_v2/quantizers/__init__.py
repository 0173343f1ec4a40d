"""The methods that choose codes and parameters for one matrix; knows nothing of files or models."""
