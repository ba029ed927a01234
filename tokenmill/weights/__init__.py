"""Where weights come from: the Hub, the embedded model, safetensors and GGUF files. No torch but in convert.py."""
