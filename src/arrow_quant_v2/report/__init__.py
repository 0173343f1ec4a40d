"""What was found out about a quantized model, shown to people: a page, the same figures as JSON, and a model card."""
