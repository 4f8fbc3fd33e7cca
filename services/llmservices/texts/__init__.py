"""Text on its way to token ids, as services share it: chat templates, tokenizer files, segments of
training data.  A library, not a process; it imports neither torch nor transformers."""
