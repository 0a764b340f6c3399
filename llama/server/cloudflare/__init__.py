"""Cloudflare Workers AI's dialect."""
