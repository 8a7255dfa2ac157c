"""Serving: durable video jobs behind an OpenAI-shaped HTTP API, on Ray Serve."""
