"""JSON schemas as clients send them, rewritten into what llguidance keeps to; what it cannot keep to is refused."""

from deployments.generation.json_schema.rewrite import Rewritten, rewritten

__all__ = ["Rewritten", "rewritten"]
