"""transformers' OpenAI-compatible server with our models, attention and pages."""
