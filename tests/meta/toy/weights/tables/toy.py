"""The toy in the layout of transformers."""

TABLES = {}
