"""What a model is shown before it is quantized, and what was seen of its layers' inputs; knows no quantizer."""
