"""The model executor: token ids in, token ids out."""
