"""Models as safetensors and JSON, written and read without pickle."""
