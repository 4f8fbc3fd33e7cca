"""The store: versions of models, whole or absent."""
