"""The HTTP server: Cloudflare's and OpenAI's dialects over one AsyncLLM. An optional extra; only the command line
imports it."""
