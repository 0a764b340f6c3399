"""The network: what Llama 3.1 is, and its weights. Read transformer.py first."""
