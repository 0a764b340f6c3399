"""The library's face: LLM, and what lies between it and the engine."""
