"""Read-ME in JAX: a pretrained dense LLM refactored into a router-decoupled mixture of experts."""

__version__ = "0.1.0"
