"""The `tokenizer` service: text in, text out; the sink of generations."""
