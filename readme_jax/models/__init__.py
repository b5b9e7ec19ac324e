"""The dense backbone, the mixture of experts made from it, and the router: Flax Linen, pure apply."""
