"""Other forms of a checkpoint (Meta's release, GGUF, a base with its adapter) into a new Hugging Face folder."""
