"""LLM for asyncio."""
