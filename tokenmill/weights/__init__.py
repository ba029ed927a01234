"""Sources of weights: the Hub, the embedded model, safetensors and GGUF files. Only convert.py imports torch."""
