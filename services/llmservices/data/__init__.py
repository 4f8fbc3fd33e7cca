"""The data service: files in, batches out; a batch is a pure function of plan and index."""
