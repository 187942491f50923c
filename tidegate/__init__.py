"""tidegate: self-hosted dedicated serverless inference. See docs/architecture.md."""

__version__ = "0.1.0"
