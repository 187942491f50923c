"""Offline work: OpenAI's Files and Batches, and the runner that carries batches out on capacity nobody else wants."""
