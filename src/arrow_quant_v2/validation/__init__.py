"""How close two models are; knows nothing of how either was made."""
